"""Windows: the positions that one forward pass feeds, made on the host from a frame of each row."""

from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy
import torch

from .uploads import uploaded

# Tokens of one row that attention reads as one run of a list, see [`Window`].
RUN_LENGTH = 64
# Beginnings of which rows of one pass read together, see [`Window`]: graphs have room for so many.
MOST_BEGINNINGS = 8
# What a pass of a row that speculates does, see [`self_speculation`].
DRAFT, VERIFICATION = 1, 2


class Frame(NamedTuple):
    """What a row feeds to a forward pass, in columns of its canvas.

    start, end: the window.
    first, last: the block whose logits are computed; equal if none are.
    length: the number of the row's columns.
    shown: the number of columns that the output shows.
    final: the column up to which the row is final after the pass.
    grid: the block length if a token sees up to the end of its block alone; 0 if it sees the whole row.
    causal: the columns before it see none behind themselves, and blocks are counted from it.
    is_seed: 1 if the logits are those of the token behind the clean text, which stand at its last column; else 0. So it is in
        a verification, for each token of its block.
    speculation: `DRAFT`, `VERIFICATION` or, in a denoising step, 0.
    """

    start: int
    end: int
    first: int
    last: int
    length: int
    shown: int
    final: int
    grid: int
    causal: int = 0
    is_seed: int = 0
    speculation: int = 0


class Pays(NamedTuple):
    """When it pays that rows read together the beginning that they share.

    tokens: of one row, for so many attention reads a key once.
    columns: at least so many must be saved from being read again.
    """

    tokens: int
    columns: int


@dataclass
class Window:
    """The positions of one forward pass, on the device. They are a rectangle, `(rows, window)`, as a model's own forward
    pass takes it, or a list, `(tokens,)`, as our kernels do: in a list the windows of rows that do not all feed as much stand
    one behind the other, in a rectangle the shorter ones are padded with their last column.

    slots: `(rows,)`, the slot of each row of the pass.
    owners: the slot of each token, `(rows, 1)` or `(tokens,)`.
    columns: the position of each token, `(rows, window)` or `(tokens,)`.
    lengths: as `columns`, int32, the number of columns that each token sees.
    keep: `(rows, block)`, for each position of the block, the index of its logits, in its row's window or in the list; -1
        for the column before the window, whose hidden state a recurrent cache keeps.
    final: `(rows, 1)`, see [`Frame`].
    block: `(rows, block)`, the block's columns; a block that is shorter than others is padded with the scratch column.
    shown: `(rows, block)` bool, the positions of the block that the output shows.
    speculation: `(rows,)`, see [`Frame`].
    runs: `(runs, 3)`, pieces of a list of which each belongs to one row: slot, index of the first token, number of tokens.
        A rectangle has none.
    longest: no run has more tokens.
    visible: the largest of `lengths`.
    seen: what `lengths` depends on: `"all"` (the same for all tokens), `"row"` or `"token"`.
    is_canvas: whether every row's window is its whole canvas, so that the pass refreshes the whole cache.
    is_every_slot: whether `slots` are all slots in their order.
    following: where seeds are decided, how many columns the coming passes feed of each row, and how many of them they decide.

    A pass with drafts has more rows, one for each draft of a row, see [`drafts`]. Those have the slot of their row, read its
    columns of the cache, and write the ones that they feed to draft columns, which no other row reads. Without drafts these
    are empty:

    texts: as `owners`, the line of `Canvas.tokens` that each token is read from.
    draft: `(rows,)`, which draft of its slot a row is; 0: the canvas itself.
    copies: `(rows of canvases, 1 + drafts)`, the index of the row of a canvas and of each of its drafts; where it has fewer, its
        own instead.
    aside: as `columns`, the draft column that a token is written to; -1 for those of canvases.
    own: `(rows, 3)` or `(runs, 3)`, the first column that a draft feeds, the one behind the last, and the draft column of the
        first; zeros for canvases.
    draft_columns: the number of draft columns that the pass writes.

    In a list, rows that share a beginning may read it together, see [`Cascade`]. Which rows do is not a matter of shapes, but
    whether any do: these are empty where it does not pay, see [`Pays`].

    pieces: `(pieces, 3)`, as `runs`: the list cut into pieces that read of one beginning, that of the slot; empty ones behind.
    beginnings: as `columns`, int32, how many columns each token reads with others.
    skipped: `(runs,)`, how many columns the tokens of each run read with others.
    """

    slots: torch.Tensor
    owners: torch.Tensor
    columns: torch.Tensor
    lengths: torch.Tensor
    keep: torch.Tensor
    final: torch.Tensor
    block: torch.Tensor
    shown: torch.Tensor
    runs: torch.Tensor
    longest: int
    visible: int
    seen: str
    is_canvas: bool
    is_every_slot: bool
    following: tuple[tuple[int, int], ...] = ()
    speculation: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    texts: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    draft: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    copies: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    aside: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    own: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.long))
    draft_columns: int = 0
    pieces: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.long))
    beginnings: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    skipped: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def to(self, device: torch.device) -> "Window":
        """The window with its tensors on a device."""
        if device.type == "cpu":
            return self
        # One upload: small copies cost the host more than the GPU.
        tensors = [getattr(self, name) for name in TENSORS]
        parts = uploaded(torch.cat([each.flatten().long() for each in tensors]), device).split(
            [each.numel() for each in tensors]
        )
        return replace(self, **{name: part.view(x.shape).to(x.dtype) for name, part, x in zip(TENSORS, parts, tensors)})

    def repeated(self, times: int, slots: int) -> "Window":
        """The window of `times` copies of the rows, each copy `slots` slots behind the one before."""
        tokens = self.columns.numel() if self.columns.ndim == 1 else 0
        together = lambda x, step: torch.cat([x + copy * step for copy in range(times)])
        slot, first, number = self.runs.unbind(1)
        own_first, own_last, begin = self.own.unbind(1)
        moved = (torch.where(self.aside < 0, -1, self.aside + copy * self.draft_columns) for copy in range(times))
        return replace(
            self,
            slots=together(self.slots, slots),
            owners=together(self.owners, slots),
            columns=together(self.columns, 0),
            lengths=together(self.lengths, 0),
            keep=together(self.keep, tokens),
            final=together(self.final, 0),
            runs=torch.stack([together(slot, slots), together(first, tokens), together(number, 0)], dim=1),
            aside=torch.cat(list(moved)),
            own=torch.stack(
                [together(own_first, 0), together(own_last, 0), together(begin, self.draft_columns)], dim=1
            ),
            pieces=self.pieces[:0],
            beginnings=self.beginnings[:0],
            skipped=self.skipped[:0],
        )


TENSORS = tuple(field.name for field in fields(Window) if field.type is torch.Tensor)


def make_window(
    frames: list[Frame],
    slots: list[int],
    number: int,
    scratch: int,
    shift: int,
    before: int = 0,
    multiple: int = 1,
    drafts: list[int] | None = None,
) -> Window:
    """The rectangle of a pass over rows with any frames, on the CPU.

    Args:
        slots: the slot of each row.
        number: the number of all slots.
        scratch: the index of the scratch column.
        shift: the logits of position i stand at position i - `shift`.
        before: how many columns before the window `keep` may point to.
        multiple: windows that shrink from block to block are padded to a multiple of it: fewer shapes, fewer graphs.
        drafts: for each row, which draft of its slot it is, see [`Window`]; the canvases themselves come first.
    """
    table = _table(frames)[:, :, None]
    start, end, first, last, length, _, _, grid, causal, is_seed, _ = table.swapaxes(0, 1)
    width, block_width = int((end - start).max()), int((last - first).max())
    if not grid.any() and width > block_width + shift and start.any():
        width += -width % multiple
    columns = numpy.minimum(start + numpy.arange(width), end - 1)
    lengths = _lengths(columns, length, grid, causal)
    visible = int(lengths.max())
    if (lengths == visible).all():
        seen = "all"
    else:
        seen = "row" if (lengths == lengths[:, :1]).all() else "token"
    keep = (_kept(first, last, shift, is_seed) - start) * (last > first)
    tokens = {"owners": numpy.array(slots)[:, None], "columns": columns, "lengths": lengths.astype(numpy.int32)}
    tokens |= {"keep": keep.clip(-before, width - 1), "runs": numpy.empty((0, 3), numpy.int64)}
    if drafts is not None:
        begin, tokens["own"], copies = _drafts(table[:, :2, 0], slots, drafts)
        draft = numpy.array(drafts)[:, None]
        tokens["aside"] = numpy.where(draft > 0, begin[:, None] + columns - start, -1)
        tokens |= {"texts": tokens["owners"] + number * draft, **copies}
    return _window(table, slots, number, scratch, tokens, longest=width, visible=visible, seen=seen)


def make_list(
    frames: list[Frame],
    slots: list[int],
    number: int,
    scratch: int,
    shift: int,
    padded_up_to: int = 0,
    drafts: list[int] | None = None,
    beginnings: list[tuple[int, int]] | None = None,
    pays: Pays | None = None,
) -> Window:
    """The list of a pass over rows with any frames, on the CPU. Rows whose window is empty take part with their block alone.
    The other arguments are those of [`make_window`].

    Args:
        padded_up_to: lists of at most so many tokens are filled up with idle tokens and empty runs, unless all rows feed
            equally many: fewer shapes, fewer graphs.
        beginnings: for each row, which one it shares and how many columns of it, see [`Extents.beginning_of`]; rows of one,
            but for drafts, stand side by side.
        pays: when rows read them together; None: never.
    """
    table = _table(frames)
    start, end, first, last, length, _, _, grid, causal, is_seed, _ = table.T
    slot, width = numpy.array(slots), end - start
    begin = width.cumsum() - width
    row = _repeated(width)
    columns = start[row] + numpy.arange(len(row)) - begin[row]
    lengths = _lengths(columns, length[row], grid[row], causal[row])
    visible, widest = int(lengths.max()), int(width.max())
    longest = _longest_run(widest)
    of, runs = _cut(slot, begin, width, longest)
    # The rows that see most first: a GPU that comes to them last would wait for them alone.
    order = (-numpy.where(grid > 0, end, length)[of]).argsort(kind="stable")
    runs, owners, of_drafts = runs[order], slot[row], {}
    if drafts is not None:
        first_aside, own, copies = _drafts(table[:, :2], slots, drafts)
        draft = numpy.array(drafts)[row]
        aside = numpy.where(draft > 0, first_aside[row] + columns - start[row], -1)
        of_drafts = {"texts": owners + number * draft, "aside": aside, "own": own[of][order], **copies}
    if len(row) <= padded_up_to and (widest > RUN_LENGTH or int(width.min()) < widest):
        power = 1 << (len(row) - 1).bit_length()
        step = max(16, min(power, 64 if power <= 512 else power // 32))
        more = -len(row) % step
        owners, columns, lengths = (
            _lengthened(each, more, value) for each, value in ((owners, slots[0]), (columns, scratch), (lengths, 0))
        )
        # As many runs as any rows can need for so many tokens, so that the shape depends on nothing else.
        most = len(frames) + -(-step // longest) + (len(columns) // longest if widest > longest else 0)
        begins = len(row) + longest * numpy.arange(most - len(runs))
        idle = (len(columns) - begins).clip(0, longest)
        runs = numpy.concatenate([runs, numpy.stack([numpy.full_like(idle, slots[0]), begins, idle], axis=1)])
        if drafts is not None:
            of_drafts["texts"] = _lengthened(of_drafts["texts"], more, slots[0])
            of_drafts["aside"] = _lengthened(of_drafts["aside"], more, -1)
            of_drafts["own"] = numpy.pad(of_drafts["own"], ((0, len(idle)), (0, 0)))
    of_beginnings: dict = {}
    if beginnings is not None and pays is not None:
        skipped, of_beginnings = _cascade(slot, start, width, beginnings, pays, len(columns), drafts is not None)
        if of_beginnings:
            of_beginnings["skipped"] = _lengthened(skipped[of][order], len(runs) - len(order), 0)
    kept = _kept(first[:, None], last[:, None], shift, is_seed[:, None])
    keep = begin[:, None] + (kept - start[:, None]) * (last > first)[:, None]
    tokens = {"owners": owners, "columns": columns, "lengths": lengths.astype(numpy.int32)}
    # The first logits of a sub-block stand before its window, which has it alone once that token is decoded: any will do.
    tokens |= {"keep": keep.clip(0, len(columns) - 1), "runs": runs, **of_drafts, **of_beginnings}
    return _window(table[:, :, None], slots, number, scratch, tokens, longest=longest, visible=visible, seen="token")


def steps_after(window: Window) -> list[Window]:
    """Lists of the shapes of the steps that follow a pass, if each of its rows feeds its block, or that and the finished one:
    the numbers mean nothing. None where the pass feeds no more than they do."""
    rows, block = window.keep.shape
    found = []
    for width, kept in window.following or [(block, block), (2 * block, block)][: 2 * bool(block)]:
        tokens, longest = rows * width, _longest_run(width)
        if tokens < len(window.columns):
            runs = rows * -(-width // longest)
            shorter = {
                name: getattr(window, name)[:tokens]
                for name in ("owners", "columns", "lengths", "texts", "aside", "beginnings")
            }
            shorter |= {"own": window.own[:runs], "runs": torch.zeros_like(window.runs[:runs])}
            fewer = len(window.columns) // RUN_LENGTH - tokens // RUN_LENGTH
            shorter |= {"skipped": window.skipped[:runs], "pieces": torch.zeros_like(window.pieces[fewer:])}
            shorter |= {"keep": window.keep.new_zeros(rows, kept)}
            found.append(replace(window, **shorter, longest=longest))
    return found


def _longest_run(width: int) -> int:
    """Tokens of the runs in which rows of up to `width` tokens are read."""
    return min(1 << (width - 1).bit_length(), RUN_LENGTH)


def _table(frames: list[Frame]) -> numpy.ndarray:
    """`(rows, fields)`. By NumPy, as all that is made of it: arrays are as small as PyTorch's calls are slow."""
    numbers = numpy.fromiter(chain.from_iterable(frames), numpy.int64, len(frames) * len(Frame._fields))
    return numbers.reshape(len(frames), -1)


def _repeated(counts: numpy.ndarray) -> numpy.ndarray:
    """The index of each number, as often as it says."""
    return numpy.arange(len(counts)).repeat(counts)


def _lengthened(array: numpy.ndarray, more: int, value: int) -> numpy.ndarray:
    return numpy.concatenate([array, numpy.full(more, value, array.dtype)])


def _drafts(fed: numpy.ndarray, slots: list[int], drafts: list[int]) -> tuple[numpy.ndarray, numpy.ndarray, dict]:
    """What a window knows of drafts, `fed`: `(rows, 2)`, the first column of each row's window and the one behind the last.

    Returns:
        `(rows,)`, the draft column of the first one; `(rows, 3)`, `Window.own` by rows; the fields that tokens have no part in.
    """
    draft = numpy.array(drafts)
    width = numpy.where(draft > 0, fed[:, 1] - fed[:, 0], 0)
    begin = width.cumsum() - width
    canvases = {slot: index for index, slot in enumerate(slots) if not drafts[index]}
    copies = numpy.arange(len(canvases))[:, None].repeat(1 + max(drafts), axis=1)
    for index, (slot, number) in enumerate(zip(slots, drafts)):
        copies[canvases[slot], number] = index
    own = numpy.concatenate([fed, begin[:, None]], axis=1) * (draft > 0)[:, None]
    return begin, own, {"draft": draft, "copies": copies, "draft_columns": int(width.sum())}


def _cut(slot, begin, width, longest: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Stretches of a list cut into runs: of each run, the index of its stretch; the runs."""
    pieces = -(-width // longest)
    of = _repeated(pieces)
    before = longest * (numpy.arange(len(of)) - (pieces.cumsum() - pieces)[of])
    return of, numpy.stack([slot[of], begin[of] + before, numpy.minimum(width[of] - before, longest)], axis=1)


def _cascade(
    slot, start, width, beginnings: list[tuple[int, int]], pays: Pays, tokens: int, has_drafts: bool
) -> tuple[numpy.ndarray, dict]:
    """By row the number of columns that it reads with others; and the fields of a window that follow, none if no rows do.

    Args:
        slot, start, width: `(rows,)`, of each row its slot, its window's first column, and the tokens in it.
        tokens: of the list.
    """
    key, columns = numpy.array(beginnings).T
    columns = numpy.minimum(columns, start)  # what a window feeds, drafts have elsewhere
    every, of = numpy.unique(key, return_inverse=True)
    longest = numpy.zeros(len(every), numpy.int64)
    numpy.maximum.at(longest, of, columns)
    # Reads of columns, one for each tile of queries.
    apart = numpy.bincount(of, -(-width // pays.tokens) * columns)
    saved = apart - numpy.ceil(numpy.bincount(of, width) / pays.tokens) * longest
    chosen = saved.argsort(kind="stable")[-MOST_BEGINNINGS:]
    chosen = chosen[saved[chosen] > 0]
    if not len(chosen) or saved[chosen].sum() < pays.columns:
        return columns, {}
    columns = columns * numpy.isin(of, chosen)
    (reading,) = columns.nonzero()
    # A stretch goes on to the first row of the next beginning; rows that read none of it may be in it.
    first = reading[numpy.diff(key[reading], prepend=-1) != 0]
    begin = (width.cumsum() - width)[first]
    begin[0] = 0
    _, pieces = _cut(slot[first], begin, numpy.diff(begin, append=tokens), RUN_LENGTH)
    most = tokens // RUN_LENGTH + MOST_BEGINNINGS * (1 + has_drafts)
    return columns, {
        "pieces": numpy.pad(pieces, ((0, most - len(pieces)), (0, 0))),
        "beginnings": _lengthened(columns.repeat(width).astype(numpy.int32), tokens - int(width.sum()), 0),
    }


def _lengths(columns, length, grid, causal) -> numpy.ndarray:
    """How many columns each token sees."""
    seen_by_block = ((columns - causal) // numpy.maximum(grid, 1) + 1) * grid + causal
    seen = numpy.where(grid > 0, numpy.minimum(seen_by_block, length), length)
    return numpy.where(columns < causal, columns + 1, seen)


def _kept(first, last, shift: int, is_seed) -> numpy.ndarray:
    """`(rows, block)`, the column where the logits of each position of a block stand."""
    positions = first + numpy.arange((last - first).max())
    return numpy.maximum(numpy.minimum(positions, last - 1) - numpy.maximum(is_seed, shift), 0)


def _window(table: numpy.ndarray, slots: list[int], number: int, scratch: int, tokens: dict, **scalars) -> Window:
    """A window of tokens that are known already. `table`: `(rows, fields, 1)`, the frames."""
    start, end, first, last, length, shown, final, grid, *_, speculation = table.swapaxes(0, 1)
    position = first + numpy.arange((last - first).max())
    exists = position < last
    arrays = {
        "slots": numpy.array(slots),
        "final": final,
        "block": numpy.where(exists, position, scratch),
        "shown": exists & (position < shown),
        "speculation": speculation[:, 0],
        **tokens,
    }
    tensors: dict[str, Any] = {
        name: torch.from_numpy(each) if name in TENSORS else each for name, each in arrays.items()
    }
    return Window(
        **tensors,
        is_canvas=bool(((start == 0) & (end == length) & (grid == 0)).all()),
        is_every_slot=slots == list(range(number)),
        **scalars,
    )
