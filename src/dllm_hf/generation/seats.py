"""Which row has which slot, and what of the state it can take over from another one."""

import math
from itertools import islice
from typing import Any

import numpy

from .backend import Backend
from .beginnings import Beginnings
from .cache import Copy
from .requests import Request, Row


class Seats:
    """Gives rows a slot, in an arena an extent as well, and, where blocks see earlier ones alone, the beginning of another
    row's text: such rows wait for it if it is being computed, read its keys and values where they stand if that is in an arena,
    and copy the others.

    Args:
        state: of `backend`, for so many `slots`.
        columns: no text is longer.
        shares_beginnings: whether rows take over beginnings.

    Attributes:
        shares_beginnings: whether rows take over beginnings of this backend.
        rows: by slot.
        free: the free slots, the one that has been free longest first.
    """

    def __init__(self, backend: Backend, state: Any, slots: int, columns: int, shares_beginnings: bool):
        self.backend, self.state = backend, state
        # The words of the contract that a backend may leave out.
        self.seeds_blocks = getattr(backend, "seeds_blocks", False)
        self.causal_context = getattr(backend, "causal_context", False)
        self.rows: list[Row | None] = [None] * slots
        self.free = list(range(slots))
        self._extents = getattr(state, "extents", None)
        self.shares_beginnings = shares_beginnings and backend.sees_earlier_blocks
        self._beginnings = Beginnings(slots, columns) if self.shares_beginnings else None
        self._final_lengths: dict[int, int] = {}  # by free slot, the column up to which its state is final
        self._sources: dict[
            Row, tuple[Row, int]
        ] = {}  # by waiting row, the row whose beginning it needs, and its columns

    @property
    def room(self) -> int | None:
        """Columns that rows can still get, see [`Request.columns`]; None where all slots are of one size."""
        if self._extents is None:
            return None
        return self._extents.free + self._extents.held_by(self.free)

    def seat(self, request: Request, final_length: int = 0) -> Row:
        """Give a request a slot. `final_length`: the column up to which the state of the slot is final.

        Raises:
            ValueError: there is no room in the arena.
        """
        backend, size = self.backend, request.options.block_length
        columns = request.columns(backend.block_grid)
        known = request.ids[: request.given]
        # The pass that decides a seed feeds at least the last token before it, which no other slot may read.
        found = known[:-1] if self.seeds_blocks else known
        holders, shared = ([], 0) if self._beginnings is None else self._beginnings.find(found, size)
        own = next(
            (slot for slot in holders if self.rows[slot] is None and self._can_hold(slot, columns, shared)), None
        )
        slot = next((slot for slot in self.free if slot not in holders), self.free[0]) if own is None else own
        attends = (backend.sees_earlier_blocks, backend.logits_shift, self.seeds_blocks, self.causal_context)
        row = Row(request, slot, backend.block_grid, *attends)
        row.final_length = final_length
        try:
            source = own if own is not None else self._source([each for each in holders if each != slot])
            self._make_room(slot, columns, source, shared, holders)
            self.rows[slot] = row
            self.free.remove(slot)
            if own is None and not final_length and row.first_feeds == "not yet final":
                backend.forget(self.state, slot, -1, 0, size)
            if self._beginnings is not None:
                kept = source if source is not None and source in self._beginnings else None
                self._beginnings.put(slot, known, size)
                if kept is not None:
                    self._take_over(row, kept, shared)
                elif self._extents is not None and not final_length:
                    # Of a source that has lost its extent, what the row reads too is left.
                    row.final_length = self._extents.shared_of(slot)
        except BaseException:  # no memory to move or copy what stands in the state
            self._give_back(slot)
            raise
        return row

    def drop_beginnings(self) -> None:
        """Forget what free slots hold."""
        if self._beginnings is None:
            return
        for slot in self.free:
            self._beginnings.drop(slot)
            if self._extents is not None:
                self._extents.release(slot)

    def forget(self, row: Row, column: int) -> int:
        """Forget the state of a row from `column` on. Returns the column up to which the row is final now."""
        return self.backend.forget(self.state, row.slot, row.final_length, column, row.block_length)

    def _give_back(self, slot: int) -> None:
        """Free the slot of a row that could not be seated."""
        row = self.rows[slot]
        if row is not None and slot not in self.free:
            self.leave(row, None, is_intact=False)
            return
        self.rows[slot] = None
        if self._extents is not None:
            self._extents.release(slot)
        if self._beginnings is not None:
            self._beginnings.drop(slot)

    def _can_hold(self, slot: int, columns: int, shared: int) -> bool:
        """Whether the extent of a free slot is large enough for a row that keeps the `shared` first columns and writes to the
        others, which no other slot may read; and no column besides stays taken with it."""
        extents = self._extents
        if extents is None:
            return True
        fits = extents.size_of(slot) >= columns and extents.shared_of(slot) <= shared
        return fits and not extents.strands(slot, shared, self.free)

    def _source(self, holders: list[int]) -> int | None:
        """Of the slots that hold a row's beginning, one where it is final, or will be first."""
        lengths = {slot: math.inf if (row := self.rows[slot]) is None else row.final_length for slot in holders}
        return max(holders, key=lambda slot: lengths[slot], default=None)

    def _make_room(self, slot: int, columns: int, source: int | None, shared: int, holders: list[int]) -> None:
        """Give a slot an extent, for which free slots lose theirs, those that hold the row's beginning last."""
        if self._extents is None:
            return
        if source == slot:
            self._extents.shrink(slot, columns)
            return
        self._extents.release(slot)
        # A row takes no more room than its columns, on which [`room`] relies: of a beginning that would stay for it, it gets a copy.
        if source is not None and not self._extents.strands(source, shared, self.free):
            self._extents.share(source, slot, shared)
        if self._extents.acquire(slot, columns):
            return
        for other in sorted((each for each in self.free if each != slot), key=set(holders).__contains__):
            self._extents.release(other)
            if self._beginnings is not None:
                self._beginnings.drop(other)
            if self._extents.acquire(slot, columns):
                return
        raise ValueError(
            f"{columns} columns do not fit into the {self._extents.free} that are free: remove rows first."
        )

    def _take_over(self, row: Row, source: int, shared: int) -> None:
        """`shared`: columns that the source holds or will hold."""
        other = self.rows[source]
        if other is None or other is row:
            self._copy([(row, source, self._final_lengths[source], shared)])
        else:
            self._sources[row] = other, shared
            self.take_beginnings()

    def _copy(self, takers: list[tuple[Row, int, int, int]]) -> None:
        """Copy to rows what a slot, which is final up to a column, holds before another column."""
        copies = [
            Copy(slot, row.slot, final_length, min(column, final_length), row.block_length)
            for row, slot, final_length, column in takers
        ]
        lengths = self.backend.share(self.state, copies) if copies else []
        for (row, *_), length in zip(takers, lengths):
            row.final_length = length

    def take_beginnings(self) -> None:
        """Copy the beginnings that have become final."""
        ready = [(row, *of) for row, of in self._sources.items() if of[0].final_length >= of[1]]
        self._copy([(row, source.slot, source.final_length, shared) for row, source, shared in ready])
        for row, *_ in ready:
            del self._sources[row]

    def beginning_of(self, slot: int) -> tuple[int, int]:
        """See [`Extents.beginning_of`]."""
        return (0, 0) if self._extents is None else self._extents.beginning_of(slot)

    def coming_passes(self) -> tuple[tuple[int, int], ...]:
        """See [`Window.following`]: those of each row up to the seed of the block that follows."""
        coming = set[tuple[int, int]]()
        for row in filter(None, self.rows):
            if row.speculates and row.block_length:  # of which the coming blocks are not known yet
                coming.add((row.block_length, row.block_length))
            for index, part in enumerate(islice(row.blocks, row.block_index, None)):
                feeds = [part.cell, part.sub_block] if row.uses_block_cache and not part.is_seed else [part.cell]
                coming |= {(end - start, part.span[1] - part.span[0]) for start, end in feeds}
                if index and part.is_seed:
                    break
        return tuple(sorted(coming))

    def upload(self) -> None:
        """Tell the device where the rows stand, before a step."""
        if self._extents is not None:
            self._extents.upload()

    def waits(self, row: Row) -> bool:
        """Whether a row waits for a beginning that another row computes."""
        return row in self._sources

    def leave(self, row: Row, tokens: list[int] | None, is_intact: bool) -> None:
        """Free the slot of a row, see [`Decoder.remove`]."""
        slot = row.slot
        self._sources.pop(row, None)
        self._bequeath(row, is_intact)
        if self._beginnings is not None:
            given, text = row.request.given, row.request.ids
            if tokens is not None:
                text = numpy.concatenate([text[:given], numpy.array(tokens[given:], dtype=numpy.int64)])
            self._beginnings.put(slot, text[: row.final_length if is_intact else 0], row.block_length)
            self._final_lengths[slot] = row.final_length
        self.rows[slot] = None
        self.free.append(slot)

    def _bequeath(self, row: Row, is_intact: bool) -> None:
        """Of the rows that wait for a row that leaves, the one that shares most goes on from where it is final, and the others
        wait for that one: they may share the columns that are not final yet."""
        shared = {other: columns for other, (source, columns) in self._sources.items() if source is row}
        if not shared:
            return
        heir = max(shared, key=lambda other: shared[other])
        self._sources |= {other: (heir, columns) for other, columns in shared.items()}
        del self._sources[heir]
        if is_intact:
            self._copy([(heir, row.slot, row.final_length, shared[heir])])
        self.take_beginnings()
