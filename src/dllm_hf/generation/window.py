"""Windows: the positions that one forward pass feeds, made on the host from a frame of each row."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Frame:
    """What a row feeds to a forward pass, in columns of its canvas.

    start, end: the window.
    first, last: the block whose logits are computed; equal if none are.
    length: the number of the row's columns.
    shown: the number of columns that the output shows.
    final: the column up to which the row is final after the pass.
    grid: the block length if a token sees up to the end of its block alone; 0 if it sees the whole row.
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
    """The positions of one forward pass, on the device.

    slots: `(rows,)`, the slot of each row of the pass.
    columns: `(rows, window)`, positions; a window that is shorter than others is padded with its last column.
    lengths: `(rows, window)` int32, the number of columns that each token sees.
    keep: `(rows, block)`, for each position of the block, the index into the window of its logits; -1 for the column before
        the window, whose hidden state a recurrent cache keeps.
    final: `(rows, 1)`, see [`Frame`].
    block: `(rows, block)`, the block's columns; a block that is shorter than others is padded with the scratch column.
    shown: `(rows, block)` bool, the positions of the block that the output shows.
    visible: the largest of `lengths`.
    seen: what `lengths` depends on: `"all"` (the same for all tokens), `"row"` or `"token"`.
    is_canvas: whether every row's window is its whole canvas, so that the pass refreshes the whole cache.
    is_every_slot: whether `slots` are all slots in their order.
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
        """The window with its tensors on a device."""
        if device.type == "cpu":
            return self
        # One upload: small copies from pageable memory cost the host more than the GPU.
        tensors = [getattr(self, name) for name in TENSORS]
        uploaded = torch.cat([each.flatten().long() for each in tensors]).to(device, non_blocking=True)
        parts = uploaded.split([each.numel() for each in tensors])
        return replace(self, **{name: part.view(x.shape).to(x.dtype) for name, part, x in zip(TENSORS, parts, tensors)})

    def repeated(self, times: int, slots: int) -> "Window":
        """The window of `times` copies of the rows, each copy `slots` slots behind the one before."""
        offsets = torch.arange(times, device=self.slots.device).repeat_interleave(len(self.slots)) * slots
        tensors = {name: getattr(self, name).repeat(times, 1) for name in ("columns", "lengths", "keep", "final")}
        return replace(self, slots=self.slots.repeat(times) + offsets, **tensors)


TENSORS = tuple(field.name for field in fields(Window) if field.type is torch.Tensor)


def make_window(
    frames: list[Frame], slots: list[int], number: int, scratch: int, shift: int, before: int, multiple: int = 1
) -> Window:
    """The window of a pass over rows with any frames, on the CPU.

    Args:
        slots: the slot of each row.
        number: the number of all slots.
        scratch: the index of the scratch column.
        shift: the logits of position i stand at position i - `shift`.
        before: how many columns before the window `keep` may point to.
        multiple: windows that shrink from block to block are padded to a multiple of it: fewer shapes, fewer graphs.
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
