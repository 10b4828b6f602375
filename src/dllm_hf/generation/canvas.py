"""The canvas: prompt and positions to fill, one row per sequence, left-aligned and without padding.

Position = column, so position ids, the block grid and the key-value cache need no offsets, and a row knows nothing of
the padding that its neighbours made necessary. The library's layout (left-padded prompt, then the new tokens) exists
only at the two ends: what [`Canvas`] is made from and [`Canvas.to_sequences`].
"""

from dataclasses import dataclass

import torch


@dataclass
class Window:
    """The positions fed to one forward pass.

    columns: `(batch, window)`, the columns of the canvas; `None` stands for the whole canvas.
    keep: `(batch, block)`, the indices into the window at which the logits of the block's positions stand; -1 for the
        column before the window, where the model's cache keeps what is needed of it.
    visible: the columns of the cache that any row may see.
    key_mask: `(batch, visible)` bool, those that each row may see; `None` where it is all of them.
    is_block_causal: a position sees the columns up to its own block's end, instead of all visible ones.
    settled: `(batch, 1)`, the column up to which the canvas is final; `None` where no more is than in the last window.
    """

    columns: torch.Tensor | None
    keep: torch.Tensor
    visible: int
    key_mask: torch.Tensor | None
    is_block_causal: bool = False
    settled: torch.Tensor | None = None


@dataclass
class Block:
    """One block of every row; rows whose block is shorter, or that have none left, repeat their last column.

    columns: `(batch, block)`.
    valid: `(batch, block)` bool, False where a column only repeats.
    starts, ends: `(batch,)`, first column and the one after the last.
    spans: the same as (start, end) of each row, on the host.
    shown: `(batch, block)` bool, False where the output does not show a column, since it is behind what was asked for.
    is_cut: whether there are such columns.
    masks: the masked positions that each row's block held before decoding began.
    """

    columns: torch.Tensor
    valid: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    spans: list[tuple[int, int]]
    shown: torch.Tensor
    is_cut: bool
    masks: list[int]


class Canvas:
    """Token rows of different lengths and the grid of blocks over them.

    Args:
        input_ids: `(batch, prompt)`. Mask tokens in it are positions to fill.
        attention_mask: `(batch, prompt)`, 0 on left padding.
        max_new_tokens: masks to append to each row.
        block_length: `None` puts all the masks of a row into one block.
        block_grid: `"prompt"` aligns the blocks to the prompt's end, `"zero"` to position 0.
        mask_token_id: the mask.

    Attributes:
        tokens: `(batch, width + 1)`. The last column is nobody's: a block's repeated columns are written there.
        width: columns of the longest row.
        prompt_lengths, ends: `(batch,)`. `ends` is the column after a row's last one. With the grid at position 0 the
            last block is filled up to its end with masks, which `to_sequences` cuts off again.
        key_mask: `(batch, width)` bool, the columns that exist in each row; `None` where every row has them all.
        row_lengths: columns of each row that `to_sequences` shows.
        given: `(batch, width + 1)` bool, the tokens that came with the prompt.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        max_new_tokens: int,
        block_length: int | None,
        block_grid: str,
        mask_token_id: int,
    ):
        device = input_ids.device
        padding = torch.zeros(len(input_ids), dtype=torch.long, device=device)
        if attention_mask is not None:
            padding = (attention_mask == 0).sum(-1)
        self.block_length, self.block_grid, self.mask_token_id = block_length, block_grid, mask_token_id
        self.prompt_lengths = input_ids.shape[1] - padding
        self.row_lengths = (self.prompt_lengths + max_new_tokens).tolist()
        rows = [row[pad:] for row, pad in zip(input_ids.tolist(), padding.tolist(), strict=True)]
        rows = [row + [mask_token_id] * max_new_tokens for row in rows]
        for row in rows:
            if block_grid == "zero" and mask_token_id in row[-(len(row) % block_length or block_length) :]:
                row.extend([mask_token_id] * (-len(row) % block_length))
        self.width = max(len(row) for row in rows)
        # Any token will do beyond a row's end: nobody sees it.
        self.tokens = torch.tensor([row + [0] * (self.width + 1 - len(row)) for row in rows], device=device)
        self.ends = torch.tensor([len(row) for row in rows], device=device)
        columns = torch.arange(self.width + 1, device=device)
        self.given = (self.tokens != mask_token_id) & (columns < self.prompt_lengths[:, None])
        self.key_mask = columns[:-1] < self.ends[:, None]
        if bool(self.key_mask.all()):
            self.key_mask = None
        self._input_ids = input_ids
        # Column of the canvas that each column of the library's layout shows; negative in the padding.
        self._shown = torch.arange(input_ids.shape[1] + max_new_tokens, device=device) - padding[:, None]

    def blocks(self) -> list[Block]:
        """The blocks that hold masks now, in decoding order."""
        ends = self.ends.tolist()
        rows = [row[:end] for row, end in zip(self.at(None).tolist(), ends, strict=True)]
        spans = [self._cells(*row) for row in zip(rows, self.prompt_lengths.tolist(), self.row_lengths, strict=True)]
        shown_ends = torch.tensor(self.row_lengths, device=self.tokens.device)[:, None]
        blocks = []
        for index in range(max(len(cells) for cells in spans)):
            now = [cells[index] if index < len(cells) else (0, 0) for cells in spans]
            masks = [row[start:end].count(self.mask_token_id) for row, (start, end) in zip(rows, now, strict=True)]
            starts, ends = torch.tensor(now, device=self.tokens.device).unbind(1)
            columns, valid = span_columns(starts, ends, max(end - start for start, end in now))
            is_cut = any(end > length for (_, end), length in zip(now, self.row_lengths, strict=True))
            blocks.append(Block(columns, valid, starts, ends, now, columns < shown_ends, is_cut, masks))
        return blocks

    def _cells(self, row: list[int], prompt_length: int, row_length: int) -> list[tuple[int, int]]:
        """The grid's cells that hold masks among the columns that are shown, as (start, end)."""
        if self.mask_token_id not in row[:row_length]:
            return []
        first, length = row.index(self.mask_token_id), self.block_length
        if length is None:
            return [(first, len(row))]
        anchor = 0 if self.block_grid == "zero" else prompt_length % length
        # The cell that the first mask falls into; the one before the anchor is cut short by the canvas' beginning.
        start = anchor + (first - anchor) // length * length
        cells = [(max(cell, 0), min(cell + length, len(row))) for cell in range(start, len(row), length)]
        return [cell for cell in cells if self.mask_token_id in row[cell[0] : min(cell[1], row_length)]]

    def at(self, columns: torch.Tensor | None) -> torch.Tensor:
        """The tokens at `columns`; `None` stands for the whole canvas."""
        return self.tokens[:, : self.width] if columns is None else self.tokens.gather(1, columns)

    def masked(self, block: Block) -> torch.Tensor:
        """`(batch, block)` bool, the block's positions that are still masks."""
        return (self.at(block.columns) == self.mask_token_id) & block.valid

    def write(self, block: Block, tokens: torch.Tensor) -> None:
        """Put `(batch, block)` tokens into a block."""
        self.tokens.scatter_(1, torch.where(block.valid, block.columns, self.width), tokens)

    def to_sequences(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, prompt + max_new_tokens)` in the library's layout: the prompt as it was given, padding included,
        then the new tokens."""
        tokens = self.tokens if tokens is None else tokens
        shown = tokens.gather(1, self._shown.clamp(min=0))
        prompt = self._input_ids
        shown[:, : prompt.shape[1]] = torch.where(
            self._shown[:, : prompt.shape[1]] < 0, prompt, shown[:, : prompt.shape[1]]
        )
        return shown

    def from_sequences(self, sequences: torch.Tensor) -> None:
        """Take over tokens that a hook changed, in the layout of [`Canvas.to_sequences`]."""
        if not isinstance(sequences, torch.Tensor) or sequences.shape != self._shown.shape:
            got = tuple(sequences.shape) if isinstance(sequences, torch.Tensor) else sequences
            raise ValueError(
                f"`generation_tokens_hook_func` must return the sequences, {tuple(self._shown.shape)}, but gave {got}."
            )
        columns = torch.where(self._shown < 0, self.width, self._shown)
        self.tokens.scatter_(1, columns, sequences)


def span_columns(starts: torch.Tensor, ends: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(batch, width)` columns from `starts` on. Those that would reach `ends` repeat the last column before it (and
    those below 0 the first), so that a window never touches a column that is not its row's."""
    columns = starts[:, None] + torch.arange(width, device=starts.device)
    return torch.minimum(columns, ends[:, None] - 1).clamp(min=0), columns < ends[:, None]


def still_open(masked: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """`(batch, block)` bool: `masked`, less the rows of which no column that is shown is masked."""
    return masked & (masked & shown).any(-1, keepdim=True)
