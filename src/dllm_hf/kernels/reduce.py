"""The sum of what several GPUs have computed, and what follows it in a layer, as one kernel that reads the memory of all."""

import torch

from .triton import tl, triton


def reduce_add_rms_norm(
    parts: torch.Tensor,
    flags: torch.Tensor,
    rank: int,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rounds_once: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`layers.add_rms_norm`] of a sum over all GPUs. Every GPU runs it with the same shapes, and comes to the same bits. It
    begins when all have their part, so that a part may be overwritten, and flags be used again, after the next such sum, with
    other ones, has begun.

    Args:
        parts: `(ranks,)` int64, on each GPU the address of its part of x, contiguous.
        flags: `(ranks,)` int64, on each GPU the address of `(tokens, ranks)` int32, zeros between two calls.
        rank: of this GPU. The number of GPUs must be a power of two.
        residual: `(..., size)`, contiguous, of the shape and type of x.

    Returns:
        The norm times `weight`, and the total.
    """
    size = residual.shape[-1]
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    _reduce_add_rms_norm[(residual.numel() // size,)](
        parts, flags, rank, residual, weight, normed, total, size, eps,
        RANKS=len(parts), ROUNDS_ONCE=rounds_once, BLOCK=triton.next_power_of_2(size), num_warps=8 if size > 1024 else 4,
    )  # fmt: skip
    return normed, total


if triton is not None:

    @triton.jit
    def _reduce_add_rms_norm(
        parts, flags, rank, residual, weight, normed, total, size, eps,
        RANKS: tl.constexpr, ROUNDS_ONCE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        # Tell every GPU that this one has come so far, and wait until all have. What has been told is taken back by whoever
        # reads it, so that a graph can do it again.
        other = tl.arange(0, RANKS)
        theirs = tl.load(flags + other).to(tl.pointer_type(tl.int32)) + token * RANKS + rank
        tl.atomic_xchg(theirs, tl.full([RANKS], 1, tl.int32), sem="release", scope="sys")
        own = tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + token * RANKS + other
        come = 0
        while come < RANKS:
            told = tl.atomic_cas(
                own, tl.full([RANKS], 1, tl.int32), tl.full([RANKS], 0, tl.int32), sem="acquire", scope="sys"
            )
            come += tl.sum(told, 0)
        tl.debug_barrier()
        row = token.to(tl.int64) * size
        index = tl.arange(0, BLOCK)
        inside = index < size
        values = tl.load(residual + row + index, mask=inside, other=0.0)
        dtype = values.dtype
        x = tl.zeros([BLOCK], dtype=tl.float32)
        for number in tl.static_range(RANKS):
            part = tl.multiple_of(tl.load(parts + number).to(tl.pointer_type(dtype)), 16) + row
            x += tl.load(part + index, mask=inside, other=0.0, volatile=True).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        values = (values.to(tl.float32) + x).to(dtype)
        tl.store(total + row + index, values, mask=inside)
        values = values.to(tl.float32)
        scale = tl.rsqrt((tl.sum(values * values, 0) / size + eps).to(tl.float32))  # Inductor passes `eps` as fp64
        factor = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
        result = values * scale
        if not ROUNDS_ONCE:
            result = result.to(dtype).to(tl.float32)
        result *= factor
        tl.store(normed + row + index, result.to(dtype), mask=inside)
