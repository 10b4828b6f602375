"""TRL's `SFTTrainer`, whose own loss is that of the next token."""

import pytest
import torch
from transformers import Trainer

from dllm_hf.training import DataCollatorForMaskedDiffusion, pack

from ..builders import BUILDERS, character_tokenizer, new_model
from .test_trainer import arguments, assert_same_weights, losses, texts, weights

trl = pytest.importorskip("trl")  # needs Python 3.11
from datasets import Dataset  # noqa: E402  TRL brings it

from dllm_hf.training import MaskedDiffusionSFTTrainer  # noqa: E402

TOKENIZER = character_tokenizer()
TOKENIZER.chat_template = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(params=BUILDERS)
def family(request) -> str:
    return request.param


def trainer_of(kind, family: str, folder, rows: list[dict], schedule: str = "llada", **options):
    model = new_model(family)
    size = {"block_size": 4} if schedule == "complementary" else {}
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, schedule, seed=0, **size)
    more = {"data_collator": options.pop("data_collator", collator), "peft_config": options.pop("peft_config", None)}
    training = arguments(folder, max_steps=2, learning_rate=0.1, optim="sgd")
    if kind is Trainer:
        more.pop("peft_config")
    if kind is not Trainer:
        own = {"bf16": False, "gradient_checkpointing": False, "shuffle_dataset": False, "max_length": 64}
        own["router_aux_loss_coef"] = 0.0  # TRL switches SDAR-MoE's on
        training = trl.SFTConfig(**{**training.to_dict(), **own, **options})
    data = Dataset.from_list(rows)
    return kind(
        model=model,
        args=training,
        train_dataset=data,
        eval_dataset=data,
        processing_class=TOKENIZER,
        callbacks=[collator],
        **more,
    )


# Every family, and each kind of rows with a family that sees all of a text and one that sees blocks.
TRAINED = [(family, "even") for family in BUILDERS]
TRAINED += [("llada", "ragged"), ("sdar", "ragged"), ("dream", "packed"), ("gla_dream", "packed")]


@pytest.mark.parametrize("family, rows", TRAINED)
def test_it_trains_as_the_library_s_trainer_does(family, rows, tmp_path):
    """SFTTrainer's own loss would be another one, and take no batch whose rows are of equal length."""
    schedule = "complementary" if rows == "ragged" else "llada"
    made = {
        "even": texts(8),
        "ragged": [{"input_ids": row["input_ids"][: 4 + index]} for index, row in enumerate(texts(8))],
        "packed": pack([{"input_ids": row["input_ids"][: 4 + index % 3]} for index, row in enumerate(texts(24))], 16),
    }[rows]
    library, ours = (
        trainer_of(kind, family, tmp_path, made, schedule) for kind in (Trainer, MaskedDiffusionSFTTrainer)
    )
    for trainer in (library, ours):
        trainer.train()
    assert losses(ours) == pytest.approx(losses(library), rel=1e-6)
    assert_same_weights(weights(ours.model), weights(library.model), atol=0, rtol=0)
    assert ours.evaluate()["eval_loss"] == pytest.approx(library.evaluate()["eval_loss"], rel=1e-6)


CHATS = [{"messages": [{"role": "user", "content": "a b?"}, {"role": "assistant", "content": "c!"}]}] * 4
ANSWERS = [{"prompt": "a b?", "completion": " c!"}] * 4


@pytest.mark.parametrize("rows", [CHATS, ANSWERS, [{"text": "a b? c!"}] * 4], ids=["chats", "answers", "texts"])
def test_it_makes_rows_of_the_datasets_that_sfttrainer_knows(rows, tmp_path):
    trainer = trainer_of(MaskedDiffusionSFTTrainer, "llada", tmp_path, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    whole, learnt = (TOKENIZER.decode(batch["labels"][0][batch["labels"][0] != -100]), "c!")
    assert learnt in whole and ("a b?" in whole) == ("completion" not in rows[0])
    trainer.train()
    assert len(losses(trainer)) == 2


def test_an_adapter_trains_and_nothing_else_changes(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer = trainer_of(MaskedDiffusionSFTTrainer, "sdar", tmp_path, texts(8), peft_config=config)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not value.equal(before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_the_model_decodes_as_before_under_it(tmp_path):
    trainer = trainer_of(MaskedDiffusionSFTTrainer, "llada", tmp_path, texts(8))
    prompt = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 4, "cache_policy": "dual"}
    assert torch.equal(
        trainer.model.diffusion_generate(prompt, **options), new_model("llada").diffusion_generate(prompt, **options)
    )


# --- what is refused


def test_the_trainers_of_trl_are_refused_by_name(family, tmp_path):
    with pytest.raises(ValueError, match="trl, sft.*MaskedDiffusionSFTTrainer`"):
        trainer_of(trl.SFTTrainer, family, tmp_path, texts(4))


def test_an_adapter_does_not_hide_the_model_from_that(tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="trl, sft.*MaskedDiffusionSFTTrainer`"):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        trainer_of(trl.SFTTrainer, "llada", tmp_path, texts(4), peft_config=config)


@pytest.mark.parametrize(
    "options, message", [({"data_collator": None}, "`data_collator`"), ({"loss_type": "dft"}, "`loss_type='dft'`")]
)
def test_what_does_not_fit_is_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(MaskedDiffusionSFTTrainer, "llada", tmp_path, texts(4), **options)


def test_packing_that_needs_a_collator_of_trl_is_refused(tmp_path):
    with pytest.raises(ValueError, match="padding-free"):
        trainer_of(MaskedDiffusionSFTTrainer, "llada", tmp_path, texts(4), packing=True)
