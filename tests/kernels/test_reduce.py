"""The sum over GPUs, one after the other in one process."""

import pytest
import torch

from dllm_hf.kernels.layers import add_rms_norm_torch
from dllm_hf.kernels.reduce import reduce_add_rms_norm

from .test_kernels import DEVICE, close, random


@pytest.mark.parametrize("dtype, rounds_once", [(torch.float32, False), (torch.bfloat16, True)])
def test_each_gpu_adds_and_norms_the_sum_of_all_parts(dtype, rounds_once):
    tokens, size, ranks = 3, 96, 4
    parts = random(ranks, tokens, size, dtype=dtype)
    residual, weight = random(1, tokens, size, dtype=dtype, seed=1), random(size, dtype=dtype)
    flags = torch.zeros(ranks, tokens, ranks, dtype=torch.int32, device=DEVICE)
    addresses = lambda every: torch.tensor([each.data_ptr() for each in every], device=DEVICE)
    total = parts.float().sum(0).to(dtype)[None]
    expected = add_rms_norm_torch(total, residual, weight, 1e-6, rounds_once)
    for rank in range(ranks):
        flags[rank] = 1  # what the others tell this one
        got = reduce_add_rms_norm(addresses(parts), addresses(flags), rank, residual, weight, 1e-6, rounds_once)
        for one, other in zip(got, expected):
            close(one, other, dtype)
        assert not flags[rank].any()  # taken back, so that a graph can do it again
        assert (flags[rank + 1 :, :, rank] == 1).all()  # and told to those that have not come yet
