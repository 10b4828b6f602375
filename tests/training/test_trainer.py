"""Every family under `transformers.Trainer`."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from dllm_hf.training import DataCollatorForMaskedDiffusion

from ..builders import BUILDERS, MASK, VOCAB, character_tokenizer, new_model
from ..processes import in_two_processes

pytest.importorskip("accelerate")
TOKENIZER = character_tokenizer()
SMALL = {"llada": {"init_std": 0.02}}  # what the library starts from; the builders' models are spread wider
# The loss of diffusion alone, as of the other families.
SMALL["nemotron_diffusion"] = {"initializer_range": 0.02, "dlm_loss_weight": 1.0, "ar_loss_weight": 0.0}


@pytest.fixture(params=BUILDERS)
def family(request) -> str:
    return request.param


def fresh_model(family: str):
    return new_model(family, **SMALL.get(family, {"initializer_range": 0.02}))


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def texts(number: int, length: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(MASK, (length,), generator=generator).tolist()} for _ in range(number)]


def noised(number: int) -> list[dict[str, torch.Tensor]]:
    """Features whose noise is drawn already, with more masks in some than in others and none in a prompt."""
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, seed=0)
    rows = [
        dict(text, labels=[-100] * (row % 4) + text["input_ids"][row % 4 :]) for row, text in enumerate(texts(number))
    ]
    batch = collator(rows)
    return [{name: values[row] for name, values in batch.items()} for row in range(number)]


def stack(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([one[name] for one in features]) for name in features[0]}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- the loss


@pytest.mark.parametrize(
    "schedule, options", [("llada", {}), ("dream", {"weighting": "none"}), ("complementary", {"block_size": 4})]
)
def test_the_first_loss_is_that_of_the_uniform_guess(family, schedule, options, tmp_path):
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, schedule, seed=0, **options)
    # LLaDA's is a bound, whose weights are 1 only on average: over few tokens, at low rates, they are far from it.
    training = arguments(tmp_path, max_steps=1, per_device_train_batch_size=64)
    trainer = Trainer(fresh_model(family), training, data_collator=collator, train_dataset=texts(64, 64))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(VOCAB), rel=0.05)


@pytest.mark.parametrize("weighting", ["1/t", "1-t", "cart"])
def test_the_first_loss_of_dream_is_the_uniform_guess_times_the_mean_weight(weighting, tmp_path):
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, "dream", weighting=weighting, seed=0)
    batch = collator(texts(32))
    weight = (1 / batch["mask_ratio"])[batch["labels"] != -100].mean().item()
    training = arguments(tmp_path, max_steps=1, per_device_train_batch_size=32)
    stacked = [{name: values[row] for name, values in batch.items()} for row in range(32)]
    trainer = Trainer(fresh_model("dream"), training, data_collator=stack, train_dataset=stacked)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(weight * math.log(VOCAB), rel=0.05)


def test_a_first_evaluation_is_the_uniform_guess_too(family, tmp_path):
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, "complementary", block_size=4, seed=0)
    training = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = Trainer(fresh_model(family), training, data_collator=collator, eval_dataset=texts(30))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(VOCAB), rel=0.05)


def test_a_text_is_memorised(family, tmp_path):
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, "dream", weighting="none", seed=0)
    training = arguments(tmp_path, num_train_epochs=50, max_steps=-1)
    trainer = Trainer(
        new_model(family), training, data_collator=collator, train_dataset=texts(1) * 4, callbacks=[collator]
    )
    trainer.train()
    # Where all is masked, place alone says what stands there, of which LLaDA and Dream learn little so soon.
    assert sum(losses(trainer)[-10:]) / 10 < math.log(VOCAB) / 2


def test_what_takes_the_labels_away_is_refused(family, tmp_path):
    """Label smoothing would be computed from all labels, masked or not, and by no weight."""
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, seed=0)
    training = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = Trainer(fresh_model(family), training, data_collator=collator, train_dataset=texts(4))
    with pytest.raises(ValueError, match="`mask_ratio`.*`label_smoothing_factor`"):
        trainer.train()


# --- the same steps in another way


def after_a_step(family, folder, features=None, **options) -> dict[str, torch.Tensor]:
    model = new_model(family)
    training = arguments(folder, **{"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, **options})
    trainer = Trainer(model, training, data_collator=stack, train_dataset=features or noised(8))
    trainer.train()
    return weights(model)


def test_accumulated_gradients_are_those_of_one_batch(family, tmp_path):
    one = after_a_step(family, tmp_path)
    other = after_a_step(family, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_weights(other, one, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(one[name], value) for name, value in weights(new_model(family)).items())


def test_gradient_checkpointing_changes_no_weight(family, tmp_path):
    one = after_a_step(family, tmp_path)
    assert_same_weights(after_a_step(family, tmp_path, gradient_checkpointing=True), one, atol=1e-6, rtol=1e-5)


class Stop(TrainerCallback):
    """Ends a run at a step whose schedule goes on, as an interruption does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_an_interrupted_run_ends_where_the_unbroken_one_ends(family, tmp_path):
    """12 texts in batches of 2 x 2 are 3 steps an epoch: it is interrupted in the second of three."""

    def run(folder, callbacks=(), checkpoint=None):
        collator = DataCollatorForMaskedDiffusion(TOKENIZER, seed=0)
        training = arguments(
            folder,
            max_steps=7,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=4,
        )
        model = fresh_model(family)
        trainer = Trainer(
            model, training, data_collator=collator, train_dataset=texts(12), callbacks=[collator, *callbacks]
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return losses(trainer), weights(model)

    expected, last = run(tmp_path / "unbroken")
    begun, _ = run(tmp_path / "broken", [Stop(5)])
    torch.manual_seed(123)
    resumed, resumed_last = run(tmp_path / "broken", checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert len(expected) == len(resumed) == 7  # the history of the checkpoint is kept
    assert begun == expected[:5]
    assert resumed == pytest.approx(expected, rel=1e-5)
    assert_same_weights(resumed_last, last, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_s_weights_are_read_by_the_names_on_disk(family, tmp_path):
    """What `load_best_model_at_end` comes down to."""
    model = new_model(family)
    model.save_pretrained(tmp_path)
    other = fresh_model(family)
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_weights(weights(other), weights(model), atol=0, rtol=0)


def test_weights_of_unknown_names_are_refused(family):
    model = new_model(family)
    with pytest.raises(RuntimeError, match="nowhere"):
        model.load_state_dict({**model.state_dict(), "nowhere": torch.zeros(1)})


def test_every_epoch_has_noise_of_its_own(tmp_path):
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, seed=0)
    seen = []

    def note(features):
        seen.append(collator(features)["input_ids"])
        return collator(features)

    training = arguments(tmp_path, num_train_epochs=3, max_steps=-1)
    Trainer(fresh_model("llada"), training, data_collator=note, train_dataset=texts(4), callbacks=[collator]).train()
    assert len({tuple((batch == MASK).sum(-1).sort().values.tolist()) for batch in seen}) == 3


# --- precision and adapters


def test_it_trains_in_bfloat16(family, tmp_path):
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, "dream", weighting="none", seed=0)
    training = arguments(tmp_path, num_train_epochs=10, max_steps=-1, bf16=True)
    trainer = Trainer(
        fresh_model(family), training, data_collator=collator, train_dataset=texts(1) * 8, callbacks=[collator]
    )
    trainer.train()
    history = losses(trainer)
    assert all(map(math.isfinite, history))
    assert sum(history[-4:]) < 0.7 * sum(history[:4])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_an_adapter_trains_and_nothing_else_changes(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(new_model("llada"), peft.LoraConfig(target_modules="all-linear", r=8))
    before = weights(model)
    collator = DataCollatorForMaskedDiffusion(TOKENIZER, "dream", weighting="none", seed=0)
    training = arguments(tmp_path, num_train_epochs=40, max_steps=-1)
    trainer = Trainer(model, training, data_collator=collator, train_dataset=texts(1) * 4, callbacks=[collator])
    trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < 0.8 * sum(history[:4])
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


def test_an_adapter_s_labels_are_counted_as_the_model_s_are(tmp_path):
    """Two ways to accumulate the same four rows, through the adapter's `forward`, which takes anything."""
    peft = pytest.importorskip("peft")

    def run(**options):
        torch.manual_seed(0)
        model = peft.get_peft_model(new_model("sdar"), peft.LoraConfig(target_modules="all-linear", r=2))
        training = arguments(tmp_path, max_steps=2, optim="sgd", learning_rate=0.1, **options)
        Trainer(model, training, data_collator=stack, train_dataset=noised(8)).train()
        return weights(model)

    split = run(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_weights(split, run(), atol=1e-6, rtol=1e-5)


# --- several processes

IN_TWO_PROCESSES = ("sdar", "gla_dream")


def train_side_by_side(folder: Path) -> None:
    """What each of two processes does: it leaves the weights and losses of each family."""
    for family in IN_TWO_PROCESSES:
        options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
        training = arguments(folder, per_device_train_batch_size=2, ddp_backend="gloo", **options)
        assert training.world_size == 2
        trainer = Trainer(new_model(family), training, data_collator=stack, train_dataset=noised(8))
        trainer.train()
        state = weights(trainer.accelerator.unwrap_model(trainer.model))
        torch.save((state, losses(trainer)), folder / f"{family}-{training.process_index}.pt")


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(train_side_by_side, folder)
    return folder


@pytest.mark.parametrize("family", IN_TWO_PROCESSES)
def test_two_processes_do_what_one_does_with_the_same_batch(family, trained_by_two, tmp_path):
    (one, history), (other, _) = (torch.load(trained_by_two / f"{family}-{rank}.pt") for rank in range(2))
    assert_same_weights(one, other, atol=0, rtol=0)
    model = new_model(family)
    training = arguments(tmp_path, max_steps=2, optim="sgd", learning_rate=0.1, train_sampling_strategy="sequential")
    trainer = Trainer(model, training, data_collator=stack, train_dataset=noised(8))
    trainer.train()
    assert history == pytest.approx(losses(trainer), rel=1e-5)
    assert_same_weights(one, weights(model), atol=1e-6, rtol=1e-5)
