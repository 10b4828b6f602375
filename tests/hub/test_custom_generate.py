"""The loop alone, as a repository for `generate(custom_generate=...)` of the library. `test_export.py` runs it elsewhere."""

import pytest
import torch

from dllm_hf.generation.custom_generate import generate
from dllm_hf.hub import export_loop

from ..builders import MASK, left_pad
from .conftest import LOOP_OPTIONS as OPTIONS
from .conftest import LOOP_ROWS as ROWS
from .conftest import masked_bert


@pytest.fixture(scope="module")
def bert():
    return masked_bert()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_loop(tmp_path_factory.mktemp("hub") / "loop")


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
