"""`SharedSums` in processes that share memory as GPUs do, with Triton's interpreter: they really wait for each other."""

import random
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from dllm_hf.fused import shared_sums
from dllm_hf.fused.shared_sums import SharedSums
from dllm_hf.kernels.layers import add_rms_norm_torch

from ..generation.recorded_graphs import DEVICE

SIZE, MOST = 32, 12


def allocated(size: int) -> list[torch.Tensor]:
    """What a process allocates, for all of them."""
    shapes = ((3, size, 16, SIZE), (3, MOST, SIZE)), (2, -(-MOST // size), size)
    floats = [torch.zeros(size, *shape) for shape in shapes[0]]
    return [each.share_memory_() for each in (*floats, torch.zeros(size, *shapes[1], dtype=torch.int32))]


def set_limits(size: int) -> None:
    """Sums of up to 5 tokens are pushed, of up to 12 divided."""
    shared_sums.PUSHED = {size: 5 * 4 * SIZE * (size - 1)}
    SharedSums.max_bytes = MOST * 4 * SIZE


def passes(size: int) -> list[list[tuple[int, bool]]]:
    """The sums of some forward passes: how many tokens, and whether all need the whole total."""
    draw = random.Random(size)
    numbers = [[draw.randint(1, MOST)] * draw.randint(1, 4) + [draw.randint(1, 5)] * 2 for _ in range(6)]
    return [[(each, draw.random() < 0.5 or each != of[-3]) for each in of] for of in numbers]


def run_rank(rank: int, size: int, memory: list[torch.Tensor], barrier, results) -> None:
    """Every sum of a pass adds to the total of the one before, as far as this process has it."""
    torch.set_num_threads(1)
    set_limits(size)
    left = list(memory)
    shared_sums.symmetric_memory = SimpleNamespace(
        empty=lambda *shape, dtype, device: left.pop(0)[rank],
        rendezvous=lambda own, group: SimpleNamespace(buffer_ptrs=[each.data_ptr() for each in of(own)]),
    )
    of = lambda own: next(every for every in memory if every[rank].data_ptr() == own.data_ptr())
    ranks = SimpleNamespace(rank=rank, size=size, group=None, least=lambda *_: barrier.wait())
    sums, norm = SharedSums(ranks, torch.float32, torch.device("cpu"), SIZE), nn.RMSNorm(SIZE)
    generator, errors, sent = torch.Generator().manual_seed(0), [], []
    for sums_of_pass in passes(size):
        sums.begin()
        total = expected = None
        for tokens, is_whole in sums_of_pass:
            parts = torch.randn(size, 1, tokens, SIZE, generator=generator)
            if total is None or total.shape[1] != tokens:
                total = expected = torch.randn(1, tokens, SIZE, generator=generator)
            normed, total = sums.sum_and_norm(parts[rank], total, norm, 1e-6, False, is_whole)
            wanted, expected = add_rms_norm_torch(parts.sum(0), expected, norm.weight, 1e-6, False)
            is_own = is_whole or tokens <= sums.pushed
            own = slice(None) if is_own else slice(rank, None, size)
            errors += [(normed - wanted).abs().max(), (total - expected)[:, own].abs().sum()]
            sent.append(normed.detach().numpy().tobytes())
    results.put((rank, float(torch.stack(errors).max()), zlib.crc32(b"".join(sent)), len(sent)))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled, and reach the memory of GPUs alone")
@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_wait_for_each_other_come_to_the_same_sums(size, context, monkeypatch):
    monkeypatch.setattr(shared_sums, "PUSHED", shared_sums.PUSHED)
    monkeypatch.setattr(SharedSums, "max_bytes", SharedSums.max_bytes)
    set_limits(size)
    memory, barrier, results = allocated(size), context.Barrier(size), context.Queue()
    processes = [context.Process(target=run_rank, args=(rank, size, memory, barrier, results)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(error < 1e-5 for _, error, *_ in found) and found[0][3] > 12
    assert len({digest for *_, digest, _ in found}) == 1
