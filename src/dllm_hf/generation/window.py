"""Windows: the positions that one forward pass feeds, made on the host from a few numbers of each row."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Frame:
    """What a row feeds to a forward pass, in columns of its canvas.

    start, end: the window.
    first, last: the block whose logits are asked for; equal where none are.
    length: the row's columns. Of a row whose blocks see earlier ones alone, a token sees up to its block's end, else all.
    shown: the columns that the output shows.
    final: the column up to which the row is final once the pass is done.
    grid: the block length where blocks see earlier ones alone, 0 where a token sees the whole row.
    """

    start: int
    end: int
    first: int
    last: int
    length: int
    shown: int
    final: int
    grid: int


@dataclass
class Window:
    """The positions of one forward pass, on the device; `rows` are those of the pass.

    slots: `(rows,)`, the row of the buffers that each one stands in.
    columns: `(rows, window)`, positions; past a row's own window its last column is repeated.
    lengths: `(rows, window)` int32, how many columns each token sees.
    keep: `(rows, block)`, the indices into the window at which the logits of the block's positions stand; -1 for the
        column before the window, of which a recurrent state keeps what is needed.
    final: `(rows, 1)`, see [`Frame`].
    block: `(rows, block)`, the block's columns; past a row's own block the scratch column.
    shown: `(rows, block)` bool, the positions of the block that the output shows.
    visible: the most columns that a token sees.
    seen: what lengths depend on: `"all"` (they are `visible` throughout), `"row"` or `"token"`.
    is_canvas: whether every row's window is its whole canvas and asks for a refresh of what is cached.
    is_every_slot: whether the rows are all slots in their order.
    """

    slots: torch.Tensor
    columns: torch.Tensor
    lengths: torch.Tensor
    keep: torch.Tensor
    final: torch.Tensor
    block: torch.Tensor
    shown: torch.Tensor
    visible: int
    seen: str
    is_canvas: bool
    is_every_slot: bool

    def to(self, device: torch.device) -> "Window":
        """The same on a device."""
        if device.type == "cpu":
            return self
        # One upload: small copies from pageable memory cost the host more than the GPU.
        longs = [self.slots, self.columns, self.keep, self.final, self.block, self.lengths.long(), self.shown.long()]
        parts = torch.cat([each.flatten() for each in longs]).to(device, non_blocking=True)
        parts = parts.split([each.numel() for each in longs])
        slots, columns, keep, final, block, lengths, shown = (x.view(y.shape) for x, y in zip(parts, longs))
        return replace(
            self,
            slots=slots,
            columns=columns,
            lengths=lengths.to(torch.int32),
            keep=keep,
            final=final,
            block=block,
            shown=shown.bool(),
        )

    def repeated(self, times: int, slots: int) -> "Window":
        """The same for `times` runs of the rows, the next run `slots` further on."""
        runs = torch.arange(times, device=self.slots.device).repeat_interleave(len(self.slots)) * slots
        tensors = {name: getattr(self, name).repeat(times, 1) for name in ("columns", "lengths", "keep", "final")}
        return replace(self, slots=self.slots.repeat(times) + runs, **tensors)


def make_window(
    frames: list[Frame], slots: list[int], number: int, scratch: int, shift: int, before: int, multiple: int = 1
) -> Window:
    """The window of a pass over rows that may differ in all, on the CPU.

    Args:
        slots: the slot of each row; `number` is that of all slots.
        scratch: the column, behind all others of a row, where writes of repeated positions go.
        shift: the logits of a position stand that many columns before it.
        before: how many columns before the window logits may be asked of.
        multiple: that windows which shrink from block to block are made up to: fewer shapes, fewer graphs.
    """
    table = torch.tensor([[*vars(frame).values()] for frame in frames])
    start, end, first, last, length, shown, final, grid = table[:, :, None].unbind(1)
    width, block_width = int((end - start).max()), int((last - first).max())
    if not grid.any() and width > block_width + shift and not (start == 0).all():
        width += -width % multiple
    columns = torch.minimum(start + torch.arange(width), end - 1)
    seen_by_block = (columns // grid.clamp(min=1) + 1) * grid
    lengths = torch.where(grid > 0, torch.minimum(seen_by_block, end), length)
    position = first + torch.arange(block_width)
    exists = position < last
    keep = ((torch.minimum(position, last - 1) - shift).clamp(min=0) - start) * (last > first)
    visible = int(lengths.max())
    if bool((lengths == visible).all()):
        seen = "all"
    else:
        seen = "row" if bool((lengths == lengths[:, :1]).all()) else "token"
    return Window(
        torch.tensor(slots),
        columns,
        lengths.to(torch.int32),
        keep.clamp(-before, width - 1),
        final,
        torch.where(exists, position, scratch),
        exists & (position < shown),
        visible,
        seen,
        bool(((start == 0) & (end == length) & (grid == 0)).all()),
        slots == list(range(number)),
    )
