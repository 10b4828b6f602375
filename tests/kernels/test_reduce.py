"""The sums over GPUs, one GPU after the other in one process."""

import pytest
import torch

from dllm_hf.fused.shared_sums import SharedSums
from dllm_hf.kernels.layers import add_rms_norm_torch
from dllm_hf.kernels.reduce import divide_add_rms_norm, push_add_rms_norm

from .test_kernels import DEVICE, close, random

SIZE, RANKS = 96, 4
TYPES = pytest.mark.parametrize("dtype, rounds_once", [(torch.float32, False), (torch.bfloat16, True)])


def addresses(every) -> torch.Tensor:
    return torch.tensor([each.data_ptr() for each in every], device=DEVICE)


def case(tokens: int, dtype: torch.dtype, rounds_once: bool) -> tuple:
    """The parts of all GPUs, a residual, a norm's weight, and what the sum must come to."""
    parts = random(RANKS, tokens, SIZE, dtype=dtype)
    parts[1, 0, :9] = -0.0
    residual, weight = random(1, tokens, SIZE, dtype=dtype, seed=1), random(SIZE, dtype=dtype)
    total = parts.float().sum(0).to(dtype)[None]
    return parts, residual, weight, add_rms_norm_torch(total, residual, weight, 1e-6, rounds_once)


@TYPES
def test_each_gpu_adds_and_norms_what_all_have_written_to_it(dtype, rounds_once):
    tokens, room = 3, 5
    parts, residual, weight, expected = case(tokens, dtype, rounds_once)
    empty = torch.full((RANKS, RANKS, room, SIZE), -0.0, dtype=dtype, device=DEVICE)
    for rank in range(RANKS):
        buffers = empty.clone()
        buffers[rank, :, :tokens] = parts + 0.0  # what the others have written
        buffers[rank, rank] = -0.0
        options = (residual, weight, 1e-6, rounds_once)
        got = push_add_rms_norm(parts[rank : rank + 1], addresses(buffers), rank, room, *options)
        for one, other in zip(got, expected):
            close(one, other, dtype)
        bits = lambda x: x.view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert torch.equal(bits(buffers[rank]), bits(empty[rank]))  # for the sum after the next
        others = [other for other in range(RANKS) if other != rank]
        assert torch.equal(bits(buffers[others, rank, :tokens]), bits(parts[[rank] * 3] + 0.0))


@TYPES
@pytest.mark.parametrize("is_whole", [True, False])
def test_each_gpu_adds_and_norms_its_share_for_all(dtype, rounds_once, is_whole):
    tokens = 6  # of which two GPUs have two, and two one
    parts, residual, weight, expected = case(tokens, dtype, rounds_once)
    flags = torch.zeros(2, RANKS, tokens, RANKS, dtype=torch.int32, device=DEVICE)
    results = torch.zeros(2, RANKS, 1, tokens, SIZE, dtype=dtype, device=DEVICE)
    results[1] = residual  # the total takes its place
    of = lambda every: torch.stack([addresses(each) for each in every])
    for rank in range(RANKS):
        flags[:, rank, :2] = 1  # what the others tell this one
        total = results[1, rank]
        divide_add_rms_norm(addresses(parts), of(flags), rank, total, weight, 1e-6, of(results), is_whole, rounds_once)
        assert not flags[:, rank].any()  # taken back, so that a graph can do it again
        assert (flags[:, rank + 1 :, :2, rank] == 1).all()  # and told to those that have not come yet
    for rank in range(RANKS):
        assert torch.equal(results[0, rank], results[0, 0])
        own = slice(None) if is_whole else slice(rank, None, RANKS)
        close(results[0, rank], expected[0], dtype)
        close(results[1, rank][:, own], expected[1][:, own], dtype)


def test_few_tokens_are_pushed_more_divided_and_the_rest_left_to_nccl(monkeypatch):
    row = 2 * 4096
    for ranks in (2, 4, 8):
        pushed, tokens = SharedSums.limits(row, ranks)
        assert 32 < pushed < tokens == SharedSums.max_bytes // row
    assert SharedSums.limits(row, 16)[0] == 0
    monkeypatch.setattr(SharedSums, "max_bytes", 2**20)
    assert SharedSums.limits(row, 2) == (128, 128)
