"""`attn_implementation="canvas"`: the kernel as a back end of the library's, chosen by name."""

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from dllm_hf.generation import attention

from ..builders import left_pad, new_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = [(family, policy) for family in ("llada", "dream") for policy in ("none", "prefix", "dual")]
POLICIES += [(family, policy) for family in ("sdar", "sdar_moe") for policy in ("none", "block")]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]


def lengths_of(mask_function, **kwargs):
    lengths = attention.canvas_mask(batch_size=2, q_length=3, kv_length=3, mask_function=mask_function, **kwargs)
    assert lengths.dtype == torch.int32
    return lengths[:, 0, :, 0]


def test_a_mask_that_ends_somewhere_becomes_a_number_of_keys():
    padded_behind = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert lengths_of(bidirectional_mask_function, attention_mask=padded_behind).tolist() == [[2, 2, 2], [3, 3, 3]]
    assert lengths_of(causal_mask_function, allow_is_causal_skip=False).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_any_other_mask_stays_a_mask():
    padded_in_front = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    mask = attention.canvas_mask(
        batch_size=2, q_length=3, kv_length=3, mask_function=bidirectional_mask_function, attention_mask=padded_in_front
    )
    assert mask.shape == (2, 1, 3, 3) and mask[0, 0, 0].tolist() == [False, True, True]


@pytest.mark.parametrize("family, policy", POLICIES)
def test_every_policy_decodes_with_it(family, policy, monkeypatch):
    calls, kernel = [], attention.canvas_attention
    monkeypatch.setattr(attention, "canvas_attention", lambda *args: calls.append(1) or kernel(*args))
    model = new_model(family).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in left_pad(ROWS).items()}
    options = {"max_new_tokens": 10, "block_length": 4, "cache_policy": policy, "disable_compile": True}
    draws = lambda: torch.Generator(DEVICE).manual_seed(0)
    expected = model.diffusion_generate(**batch, **options, generator=draws())
    model.set_attn_implementation("canvas")
    assert model.diffusion_generate(**batch, **options, generator=draws()).tolist() == expected.tolist()
    assert bool(calls) == (DEVICE == "cuda")
