"""The loop alone, as a repository for `generate(custom_generate=...)` of the library."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GenerationMixin

from dllm_hf.generation.custom_generate import generate
from dllm_hf.hub import export_loop

from ..builders import END, MASK, VOCAB, left_pad

ROWS = [[5, 6, 7], [8, MASK, 9, 10, 11]]
OPTIONS = {"mask_token_id": MASK, "eos_token_id": END, "max_new_tokens": 9, "steps": 3}


class MaskedBert(BertForMaskedLM, GenerationMixin):
    """A masked model of the library with the library's `generate`."""


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return MaskedBert(BertConfig(vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_loop(tmp_path_factory.mktemp("hub") / "loop")


def test_it_runs_where_dllm_hf_is_not(bert, folder, tmp_path):
    expected = generate(bert, **left_pad(ROWS, pad=0), **OPTIONS).tolist()
    bert.save_pretrained(tmp_path / "bert")
    code = f"""
import sys; sys.modules["dllm_hf"] = None
import torch
from transformers import BertForMaskedLM, GenerationMixin
class MaskedBert(BertForMaskedLM, GenerationMixin): pass
model = MaskedBert.from_pretrained({str(tmp_path / "bert")!r})
inputs = {{name: torch.tensor(rows) for name, rows in { ({name: x.tolist() for name, x in left_pad(ROWS, pad=0).items()})!r}.items()}}
tokens = model.generate(**inputs, custom_generate={str(folder)!r}, trust_remote_code=True, **{OPTIONS!r})
assert tokens.tolist() == {expected!r}, tokens
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_masks_are_filled_and_a_row_is_what_it_is_alone(bert):
    together = generate(bert, **left_pad(ROWS, pad=0), **OPTIONS)
    assert together.shape == (2, 14) and not (together == MASK).any()
    for row, tokens in zip(ROWS, together):
        alone = generate(bert, torch.tensor([row]), **OPTIONS)
        assert tokens[5 - len(row) :].tolist() == alone[0].tolist()


def test_a_model_whose_predictions_are_shifted_says_so(bert):
    tokens = generate(bert, torch.tensor([ROWS[0]]), **{**OPTIONS, "max_new_tokens": 1, "steps": 1}, logits_shift=1)
    with torch.no_grad():
        logits = bert(torch.tensor([[*ROWS[0], MASK]])).logits[0, 2]
    logits[MASK] = -torch.inf
    assert tokens[0, -1] == logits.argmax()


def test_a_mask_token_is_asked_for(bert):
    with pytest.raises(ValueError, match="mask_token_id"):
        generate(bert, torch.tensor([ROWS[0]]))


def test_what_cannot_apply_is_refused_and_what_is_empty_is_not(bert):
    empty = {"assistant_model": None, "synced_gpus": False, "prefix_allowed_tokens_fn": None}
    assert generate(bert, torch.tensor([ROWS[0]]), **OPTIONS, **empty).shape == (1, 12)
    with pytest.raises(ValueError, match="assistant_model"):
        generate(bert, torch.tensor([ROWS[0]]), **OPTIONS, assistant_model=bert)


def test_a_folder_that_is_there_is_left_alone(folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="is there already"):
        export_loop(folder)
    assert sorted(folder.rglob("*")) == before
