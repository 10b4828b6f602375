"""`examples/shakespeare.py`: the character tokenizer and the bound."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  registers the classes
from tests.builders import load_script

CHECKPOINT = Path(__file__).parents[2] / "hub_configs" / "llada-tiny-shakespeare"


@pytest.fixture(scope="module")
def script():
    return load_script("examples/shakespeare.py")


@pytest.fixture(scope="module")
def text():
    lines = ["ROMEO:\n", "wherefore ", "art thou, ", "sweet night? ", "  Ay; 't is.\n\n"]
    return "".join(random.Random(0).choices(lines, k=300))


@pytest.fixture(scope="module")
def tokenizer(script, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    script.main(["tokenizer", "--text", str(folder / "text.txt"), "--out", str(folder)])
    return AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_gives_every_text_back(tokenizer, text):
    for sample in (text, "  sweet  night ,\n\n\n; is .\n", " 't is , .", "\n", ""):
        assert tokenizer.decode(tokenizer(sample, verbose=False).input_ids) == sample
    assert tokenizer("a\nt").input_ids == tokenizer.convert_tokens_to_ids(["a", "\n", "t"])
    assert tokenizer.padding_side == "left"


def test_an_unknown_character_is_read_as_a_space(tokenizer):
    assert tokenizer.decode(tokenizer("a☃t").input_ids) == "a t"


def test_a_text_that_holds_the_mask_is_refused(script):
    with pytest.raises(ValueError, match="░"):
        script.character_tokenizer("To be ░ not")


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINT.parent.glob("*-tiny-shakespeare")))
def test_all_checkpoints_have_one_tokenizer(name):
    tokenizers = [CHECKPOINT.parent / name / "tokenizer.json", CHECKPOINT / "tokenizer.json"]
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in tokenizers)
    assert one["model"] == other["model"]


def test_the_bound_of_a_model_that_knows_nothing_is_that_of_the_uniform_guess(script):
    """Every logit 0: the bound is log(vocabulary) nats, whatever is masked; the estimate may be off by its noise."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = torch.randint(10, (1100,))  # four windows and a rest
    loss = script.negative_evidence_bound(model, tokens, levels=16)
    assert loss == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=0.1)


def test_the_bound_is_printed_for_the_last_tenth_of_the_text(script, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n" * 100)
    script.main(["bound", str(CHECKPOINT), "--text", str(path), "--levels", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "500 tokens" in printed
    assert 0 < float(printed.split()[0]) < 4.2  # below the uniform guess


def test_wrong_arguments_are_refused_with_their_names(script, tmp_path, capsys):
    short = tmp_path / "text.txt"
    short.write_text("short")
    runs = {
        "--text": ["bound", str(CHECKPOINT), "--text", str(tmp_path / "none.txt")],
        "too short": ["bound", str(CHECKPOINT), "--text", str(short)],
        "--levels": ["bound", str(CHECKPOINT), "--text", str(short), "--levels", "0"],
    }
    for word, arguments in runs.items():
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments)
        assert stopped.value.code == 2
        assert word in capsys.readouterr().err
