"""The tokens of a forward pass in whole blocks: padding, packed samples, a last block that is not full."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..generation.window import Window


@dataclass
class BlockLayout:
    """The tokens of a forward pass in whole blocks.

    blocks: number of blocks of each row.
    positions: `(rows or 1, blocks * block_size)`, for the rotary embedding.
    valid: `(rows or 1, blocks * block_size)` bool, False where there is no token; None if the blocks are full.
    index: `(rows, length)`, the index of each token in the blocks; None if they are in order from the start.
    samples: `(rows, blocks)`, which of the samples packed into a row a block belongs to; None if there is only one.
    window: the window of the decoding loop, with the slots of the rows; None without the loop.
    final: `(rows,)`, how many of the first blocks move the state of a cache on; None if none does in any row.
    clean_rows: number of rows at the end whose states the rows before them read.
    """

    blocks: int
    positions: torch.Tensor
    valid: torch.Tensor | None = None
    index: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    window: Window | None = None
    final: torch.Tensor | None = None
    clean_rows: int = 0

    def to_blocks(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(rows, length, hidden)` -> `(rows, blocks * block_size, hidden)`."""
        width = self.positions.shape[1]
        if self.index is None:
            return F.pad(tokens, (0, 0, 0, width - tokens.shape[1]))
        return _scattered(tokens, self.index, width)

    def to_tokens(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """`(rows, blocks * block_size, hidden)` -> `(rows, length, hidden)`."""
        if self.index is None:
            return blocks[:, :length]
        index = self.index.clamp(max=blocks.shape[1] - 1)[..., None]  # that of padding is behind the blocks
        return blocks.gather(1, index.expand(-1, -1, blocks.shape[-1]))


def block_count(length: int, block_size: int) -> int:
    """The blocks of `length` tokens. A program exported for any length, a `SymInt`, gets an empty block more: whether
    there is only one block would be decided at tracing."""
    blocks = -(-length // block_size)
    return blocks if isinstance(length, int) else blocks + 1


def _scattered(values: torch.Tensor, index: torch.Tensor, width: int) -> torch.Tensor:
    """`values[row, i]` at `index[row, i]` of `(rows, width, ...)`; those at index `width` are dropped."""
    empty = values.new_zeros(values.shape[0], width + 1, *values.shape[2:])
    index = index.view(*index.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return empty.scatter(1, index, values)[:, :width]


def lay_out(
    position_ids: torch.Tensor, token_mask: torch.Tensor | None, block_size: int, counted: bool = False
) -> BlockLayout:
    """The layout of rows with padding anywhere, or of several samples packed into a row, each from position 0.

    Args:
        position_ids: `(rows, length)`; they rise by one from token to token, padding left out.
        token_mask: `(rows, length)`, 0 on padding.
        counted: whether the positions are the tokens counted from 0. Then the number of blocks follows from the shape;
            to read it from the positions would break the graph of `torch.compile`.
    """
    rows, length = position_ids.shape
    real = torch.ones_like(position_ids, dtype=torch.bool) if token_mask is None else token_mask.bool()
    is_first = real & (real.long().cumsum(-1) == 1)
    restarts = real & (position_ids == 0)
    if not counted:
        _check_positions(position_ids, real)
    begins = restarts | (real & (position_ids % block_size == 0)) | is_first
    block = (begins.long().cumsum(-1) - 1).clamp(min=0)
    blocks = block_count(length, block_size) if counted else int(block.max()) + 1
    width = blocks * block_size
    index = torch.where(real, block * block_size + position_ids % block_size, width)
    samples = _scattered((restarts & ~is_first).long().cumsum(-1), torch.where(begins, block, blocks), blocks)
    positions, valid = (_scattered(x, index, width) for x in (position_ids, real))
    return BlockLayout(blocks, positions, valid, index, samples.cummax(-1).values)


def _check_positions(position_ids: torch.Tensor, real: torch.Tensor) -> None:
    # Sort padding behind the tokens: then neighbours must be one apart.
    order = (~real).long().argsort(dim=-1, stable=True)
    ordered, exists = position_ids.gather(1, order), real.gather(1, order)
    gaps = exists[:, 1:] & (ordered[:, 1:] != 0) & (ordered.diff(dim=-1) != 1)
    if gaps.any() or (position_ids < 0).any():
        raise ValueError(
            "`position_ids` must rise by one from token to token, or start again from 0 where the next sample of a "
            "row begins: leave them out, and mark padding in `attention_mask`."
        )
