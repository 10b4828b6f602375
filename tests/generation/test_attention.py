"""`attn_implementation="canvas"`: the kernel as a back end of the library's, chosen by name."""

from contextlib import nullcontext, suppress

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from dllm_hf.generation import attention
from dllm_hf.kernels.attention import canvas_attention_torch

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


@pytest.fixture
def kernel_calls(monkeypatch):
    """As if there were a GPU: a list that receives the calls of the kernel."""
    calls = []

    def run(*args):
        calls.append(args)
        return canvas_attention_torch(*args)

    monkeypatch.setattr(attention, "canvas_attention", run)
    monkeypatch.setattr(attention.torch.cuda, "device", lambda device: nullcontext())
    return calls


def attend(is_causal=False, mask=None, grads=(), **kwargs):
    query, key, value = (torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    query.__class__ = type("OnGPU", (torch.Tensor,), {"is_cuda": True})
    for index in grads:
        (query, key, value)[index].requires_grad_()
    module = torch.nn.Module()
    module.is_causal = is_causal
    return attention.canvas_attention_forward(module, query, key, value, mask, **kwargs)[0].as_subclass(torch.Tensor)


def test_the_kernel_runs_where_it_gives_what_sdpa_gives(kernel_calls):
    lengths = torch.tensor([1, 2, 3], dtype=torch.int32)[None, None, :, None]
    torch.testing.assert_close(attend(mask=lengths), attend(mask=torch.ones(1, 1, 3, 3).tril().bool()))
    assert len(kernel_calls) == 1
    torch.testing.assert_close(attend(), attend(mask=torch.ones(1, 1, 3, 3).bool()))
    assert len(kernel_calls) == 2


@pytest.mark.parametrize(
    "kwargs",
    [
        {"is_causal": True},
        {"grads": [0]},
        {"grads": [2]},
        {"dropout": 0.5},
        {"mask": torch.ones(1, 1, 3, 3).tril().bool()},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_the_kernel_does_not_run_where_it_would_give_something_else(kernel_calls, kwargs):
    attend(**kwargs)
    assert not kernel_calls


def test_the_kernel_is_not_asked_for_what_it_does_not_know(kernel_calls):
    with suppress(ValueError):  # of newer SDPA wrappers
        attend(softcap=3.0)
    assert not kernel_calls


def test_a_mask_of_ones_and_zeros_is_not_taken_for_lengths():
    mask = torch.ones(1, 1, 3, 3).tril().int()
    with pytest.raises(RuntimeError, match="mask"):
        attend(mask=mask)
