"""`examples/train_shakespeare.py` on a small text: five steps, then everything that the card promises."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  registers the classes

SCRIPT = Path(__file__).parents[2] / "examples" / "train_shakespeare.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_shakespeare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GENERATION["max_new_tokens"] = 8  # the sample at the end of each run: keep it short
    return module


@pytest.fixture(scope="module")
def text():
    words = random.Random(0).choices(
        ["ROMEO:\n", "wherefore ", "art thou, ", "sweet night? ", "  Ay; 't is.\n\n"], k=300
    )
    return "".join(words)


def train(script, text, folder, *options):
    (folder / "text.txt").write_text(text, encoding="utf-8")
    run = "--steps 5 --batch 4 --eval-levels 2 --log-every 5 --device cpu".split()
    script.main(["--text", str(folder / "text.txt"), "--out", str(folder / "model"), *run, *options])
    return folder / "model"


@pytest.fixture(scope="module")
def folder(script, text, tmp_path_factory):
    return train(script, text, tmp_path_factory.mktemp("shakespeare"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_weights_are_bfloat16_and_fit_in_4_megabytes(folder, model):
    assert model.dtype == torch.bfloat16
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000


def test_the_tokenizer_gives_every_text_back(tokenizer, text):
    for sample in (text, "  sweet  night ,\n\n\n; is .\n", " 't is , .", "\n", ""):
        assert tokenizer.decode(tokenizer(sample, verbose=False).input_ids) == sample
    assert tokenizer("a\nt").input_ids == tokenizer.convert_tokens_to_ids(["a", "\n", "t"])
    assert tokenizer.padding_side == "left"


def test_an_unknown_character_is_read_as_a_space(tokenizer):
    assert tokenizer.decode(tokenizer("a☃t").input_ids) == "a t"


def test_it_continues_a_prompt_with_the_options_of_the_folder(model, tokenizer):
    assert model.generation_config.block_length == 32
    prompt = tokenizer("ROMEO:\n", return_tensors="pt")
    sequences = model.diffusion_generate(**prompt, max_new_tokens=40)
    assert sequences.shape == (1, 47)
    assert sequences[0, :7].equal(prompt.input_ids[0])
    assert not (sequences == tokenizer.mask_token_id).any()


def test_masks_typed_into_a_prompt_are_filled_in(model, tokenizer):
    prompt = tokenizer("art ░░░░, sweet ░░░░░?", return_tensors="pt")
    masked = prompt.input_ids == tokenizer.mask_token_id
    assert masked.sum() == 9
    filled = model.diffusion_generate(**prompt, max_new_tokens=0)
    assert not (filled == tokenizer.mask_token_id).any()
    assert filled[~masked].equal(prompt.input_ids[~masked])


def test_the_same_seed_gives_the_same_weights(script, text, folder, tmp_path):
    again = train(script, text, tmp_path)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_interrupted_run_saves_what_it_has(script, text, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", interrupt)
    folder = train(script, text, tmp_path)
    assert "Interrupted" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llada"


def test_the_held_out_loss_of_a_model_that_knows_nothing_is_that_of_the_uniform_guess(script, model):
    """Every logit 0: the bound is log(vocabulary) nats, whatever is masked; the estimate may be off by its noise."""
    ignorant = type(model)(model.config)
    torch.nn.init.zeros_(ignorant.lm_head.weight)
    tokens = torch.randint(10, (1100,))  # four windows and a rest
    loss = script.held_out_loss(ignorant, tokens, levels=16)
    assert loss == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=0.1)


def test_a_text_that_is_not_there_or_too_short_is_refused(script, tmp_path, capsys):
    for text in (None, "too short"):
        path = tmp_path / "text.txt"
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit):
            script.main(["--text", str(path), "--out", str(tmp_path / "model")])
        assert "--text" in capsys.readouterr().err
