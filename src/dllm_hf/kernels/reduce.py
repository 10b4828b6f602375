"""The sum of what several GPUs have computed, and what follows it in a layer, as one kernel that reads and writes the memory of
all. Every GPU runs a kernel with the same shapes, and all come to the same bits: parts are added in the same order.
"""

import torch

from .triton import tl, triton


def push_add_rms_norm(
    x: torch.Tensor,
    buffers: torch.Tensor,
    rank: int,
    room: int,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rounds_once: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`layers.add_rms_norm`] of a sum over all GPUs, for few tokens: each GPU writes its part into the memory of all, and waits
    until all parts have come to its own. A number that has come is told from one that has not by its bits, so that a sum takes
    one way through the wires, and not one for a flag and two for the data (as the "Lamport" kernels of TensorRT-LLM,
    https://github.com/NVIDIA/TensorRT-LLM).

    Args:
        x: `(..., size)`, the part of this GPU.
        buffers: `(ranks,)` int64, on each GPU the address of `(ranks, room, size)` numbers of the type of x. All are -0.0, which
            stands for nothing, before a call and after it; two calls in a row must have different buffers.
        rank: of this GPU. The number of GPUs must be a power of two.
        room: of tokens.
        residual: `(..., size)`, contiguous, of the shape and type of x.

    Returns:
        The norm times `weight`, and the total.
    """
    size, ranks = residual.shape[-1], len(buffers)
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    _push_add_rms_norm[(residual.numel() // size,)](
        x.contiguous(), buffers, rank, room, residual, weight, normed, total, size, eps,
        RANKS=ranks, ROUNDS_ONCE=rounds_once, BITS=tl.int32 if x.dtype == torch.float32 else tl.int16,
        EMPTY=-(2 ** (8 * x.itemsize - 1)), BLOCK=triton.next_power_of_2(size), num_warps=_warps(size),
    )  # fmt: skip
    return normed, total


def divide_add_rms_norm(
    parts: torch.Tensor,
    flags: torch.Tensor,
    rank: int,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    results: torch.Tensor,
    is_whole: bool,
    rounds_once: bool = False,
) -> None:
    """[`layers.add_rms_norm`] of a sum over all GPUs, for many tokens: each GPU reads the parts of its share of the tokens, and
    writes their norm into the memory of all (two shots: a reduce-scatter and an all-gather). It begins when all have their part,
    and ends when all have written.

    Token t is of the GPU with rank t modulo the number of GPUs, so that it is the same one in all sums over so many tokens, and
    the total need not be told to the others as long as no other code reads it.

    Args:
        parts: `(ranks,)` int64, on each GPU the address of its part of x, `(tokens, size)`, contiguous.
        flags: `(2, ranks)` int64, on each GPU the addresses of two arrays `(tokens, ranks)` int32, zeros between two calls.
        rank: of this GPU. The number of GPUs must be a power of two.
        residual: `(..., size)`, contiguous, of the shape and type of x; read at the tokens of this GPU.
        results: `(2, ranks)` int64, on each GPU the addresses of the norm times `weight` and of the total, of the shape of x.
            `residual` may be the total.
        is_whole: whether the total of all tokens is written on all GPUs, or on each that of its own ones.
    """
    size, ranks = residual.shape[-1], len(parts)
    tokens = residual.numel() // size
    _divide_add_rms_norm[(triton.cdiv(tokens, ranks),)](
        parts, flags, rank, residual, weight, results, tokens, size, eps,
        RANKS=ranks, WHOLE=is_whole, ROUNDS_ONCE=rounds_once, BLOCK=triton.next_power_of_2(size), num_warps=_warps(size),
    )  # fmt: skip


def _warps(size: int) -> int:
    return 4 if size <= 1024 else 8 if size <= 4096 else 16


if triton is not None:

    @triton.jit
    def _meet(flags, slot, rank, RANKS: tl.constexpr):
        """Tell every GPU that this one has come so far, and wait until all have. What has been told is taken back by whoever
        reads it, so that a graph can do it again."""
        tl.debug_barrier()  # what all threads have written comes before
        other = tl.arange(0, RANKS)
        theirs = tl.load(flags + other).to(tl.pointer_type(tl.int32)) + slot * RANKS + rank
        tl.atomic_xchg(theirs, tl.full([RANKS], 1, tl.int32), sem="release", scope="sys")
        own = tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + slot * RANKS + other
        come = 0
        while come < RANKS:
            told = tl.atomic_cas(
                own, tl.full([RANKS], 1, tl.int32), tl.full([RANKS], 0, tl.int32), sem="acquire", scope="sys"
            )
            come += tl.sum(told, 0)
        tl.debug_barrier()

    @triton.jit
    def _add_and_norm(x, values, factor, size, eps, ROUNDS_ONCE: tl.constexpr):
        """The total and its norm. `x`, `factor`: float32."""
        dtype = values.dtype
        total = (values.to(tl.float32) + x.to(dtype).to(tl.float32)).to(dtype)
        wide = total.to(tl.float32)
        scale = tl.rsqrt((tl.sum(wide * wide, 0) / size + eps).to(tl.float32))  # Inductor passes `eps` as fp64
        result = wide * scale
        if not ROUNDS_ONCE:
            result = result.to(dtype).to(tl.float32)
        return total, (result * factor).to(dtype)

    @triton.jit
    def _push_add_rms_norm(
        own, buffers, rank, room, residual, weight, normed, total, size, eps,
        RANKS: tl.constexpr, ROUNDS_ONCE: tl.constexpr, BITS: tl.constexpr, EMPTY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        row = token.to(tl.int64) * size
        index = tl.arange(0, BLOCK)
        inside = index < size
        part = tl.load(own.to(tl.pointer_type(BITS)) + row + index, mask=inside, other=0)
        part = tl.where(part == EMPTY, 0, part).to(BITS)  # the other zero
        step = room.to(tl.int64) * size
        for number in tl.static_range(RANKS):
            theirs = tl.multiple_of(tl.load(buffers + number).to(tl.pointer_type(BITS)), 16)
            tl.store(theirs + rank * step + row + index, part, mask=inside)
        values = tl.load(residual + row + index, mask=inside, other=0.0)
        factor = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
        mine = tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(BITS)), 16)
        every = mine + tl.arange(0, RANKS)[:, None] * step + row + index[None]
        bits = tl.load(every, mask=inside[None], other=0, volatile=True)
        while tl.sum(tl.sum((bits == EMPTY).to(tl.int32), 0), 0) > 0:
            bits = tl.load(every, mask=inside[None], other=0, volatile=True)
        # For the sum after the next one, which nobody begins before this program has ended.
        tl.store(every, tl.full([RANKS, BLOCK], EMPTY, BITS), mask=inside[None])
        x = tl.sum(bits.to(values.dtype, bitcast=True).to(tl.float32), 0)
        values, result = _add_and_norm(x, values, factor, size, eps, ROUNDS_ONCE)
        tl.store(total + row + index, values, mask=inside)
        tl.store(normed + row + index, result, mask=inside)

    @triton.jit
    def _divide_add_rms_norm(
        parts, flags, rank, residual, weight, results, tokens, size, eps,
        RANKS: tl.constexpr, WHOLE: tl.constexpr, ROUNDS_ONCE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        token = program * RANKS + rank
        row = tl.minimum(token, tokens - 1).to(tl.int64) * size
        index = tl.arange(0, BLOCK)
        inside = index < size
        values = tl.load(residual + row + index, mask=inside, other=0.0)
        factor = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
        dtype = values.dtype
        _meet(flags, program, rank, RANKS)
        x = tl.zeros([BLOCK], dtype=tl.float32)
        for number in tl.static_range(RANKS):
            part = tl.multiple_of(tl.load(parts + number).to(tl.pointer_type(dtype)), 16) + row
            x += tl.load(part + index, mask=inside, other=0.0, volatile=True).to(tl.float32)
        values, result = _add_and_norm(x, values, factor, size, eps, ROUNDS_ONCE)
        if token < tokens:
            for number in tl.static_range(RANKS):
                normed = tl.multiple_of(tl.load(results + number).to(tl.pointer_type(dtype)), 16) + row
                tl.store(normed + index, result, mask=inside)
                if WHOLE:
                    total = tl.multiple_of(tl.load(results + RANKS + number).to(tl.pointer_type(dtype)), 16) + row
                    tl.store(total + index, values, mask=inside)
            if not WHOLE:
                own = tl.multiple_of(tl.load(results + RANKS + rank).to(tl.pointer_type(dtype)), 16) + row
                tl.store(own + index, values, mask=inside)
        _meet(flags + RANKS, program, rank, RANKS)
