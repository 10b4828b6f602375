"""What only GLADream's decoding owes. The rest is what every family owes: tests/contracts."""

import pytest
import torch

from ..builders import MASK, generate, new_model, recorded, tiny_model
from ..contracts.calls import STATIC, span


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_mask_is_left_in_any_precision(dtype):
    model = new_model("gla_dream", logits_shift=1).to(dtype)
    assert MASK not in generate(model, [span(1, 8), []], max_new_tokens=9, cfg_scale=0.5, **STATIC).sequences


@pytest.mark.parametrize("length", [1, 2, 8])
def test_another_block_length_than_the_model_s_is_refused(length):
    model = tiny_model("gla_dream")
    with recorded(model) as calls, pytest.raises(ValueError, match=f"`block_length={length}`.*`block_size=4`.*leave"):
        generate(model, [[1, 2]], max_new_tokens=4, block_length=length)
    assert not calls
    generate(model, [[1, 2]], max_new_tokens=4, block_length=4)
