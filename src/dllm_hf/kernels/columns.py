"""Copies of columns from one extent of an arena to others: many at once, where each alone would be launches of its own."""

import torch

from .triton import tl, triton

BLOCK = 32


def copy_columns_torch(arena: torch.Tensor, runs: torch.Tensor, longest: int) -> None:
    """The twin of [`copy_columns`]."""
    for source, target, size in runs.tolist():
        arena[:, target : target + size] = arena[:, source : source + size]


def copy_columns(arena: torch.Tensor, runs: torch.Tensor, longest: int) -> None:
    """Copy runs of columns of an arena.

    Args:
        arena: `(heads, columns, head_dim)`, the last dimension contiguous.
        runs: `(runs, 3)` int64: first column of the source, of the target, and the number of columns. No target is part of
            another run.
        longest: no run has more columns.
    """
    heads, _, head_dim = arena.shape
    _copy_columns[(triton.cdiv(longest, BLOCK), len(runs), heads)](
        arena, runs, *arena.stride()[:2], HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _copy_columns(
        arena, runs, head_stride, column_stride,
        HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        run = runs + 3 * tl.program_id(1)
        source, target, size = tl.load(run), tl.load(run + 1), tl.load(run + 2)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        dims = tl.arange(0, BLOCK_D)
        inside = (column < size)[:, None] & (dims < HEAD_DIM)
        of_head = arena + tl.program_id(2).to(tl.int64) * head_stride
        values = tl.load(of_head + (source + column)[:, None] * column_stride + dims, mask=inside)
        tl.store(of_head + (target + column)[:, None] * column_stride + dims, values, mask=inside)
