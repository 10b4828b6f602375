"""Where the columns of each slot are in an arena that all slots share."""

import itertools
from collections.abc import Callable

import torch

from .uploads import uploaded


class Extents:
    """Gives slots runs of columns of one arena. A canvas' length is known before a row begins, so that a row has one extent,
    from its admission to its end. Gaps between extents are closed by moving extents when a new one does not fit otherwise.

    Slots may share the beginning of their canvas: it becomes an extent that stays as long as one of them reads it, and the
    extents of these slots hold the columns behind it alone.

    The arena's first column is the scratch column of slots without an extent.

    Args:
        slots: slots that may have an extent.
        columns: of the arena.
        longest: no canvas is longer.
        move: copies runs of columns, a list of `(source, target, size)`, to lower ones, which stand one behind the other and
            may overlap their sources.

    Attributes:
        table: `(4, slots)`, on the device: column i of a slot's canvas is column base + i of the arena, before `shared` it is
            shared_base + i; rows are base, the number of columns of the canvas, shared_base, shared. A captured step reads
            them, so that it does not depend on what the extents are. As of the last [`Extents.upload`].
    """

    def __init__(
        self,
        slots: int,
        columns: int,
        longest: int,
        device: torch.device,
        move: Callable[[list[tuple[int, int, int]]], None],
    ):
        self.columns, self.longest, self._move = columns, longest, move
        self._table = torch.tensor([[0], [1], [0], [0]]).repeat(1, slots)
        self.table = self._table.to(device)
        self._held: dict[int, tuple[int, int]] = {}  # by slot, and by the key of a shared beginning
        self._shared: dict[
            int, tuple[int, int]
        ] = {}  # by slot: a shared beginning's key, and how much of it the slot reads
        self._keys = itertools.count(slots)
        self._changed: set[int] = set()  # slots of which the device's table does not know

    def place_of(self, slot: int, column: int) -> int:
        """The column of the arena where a column of a slot's canvas stands."""
        key, shared = self.beginning_of(slot)
        return self._held[key][0] + column if column < shared else self._held[slot][0] + column - shared

    def size_of(self, slot: int) -> int:
        """Columns of a slot's canvas, those that it shares included; 0 without an extent."""
        return self._held[slot][1] + self.shared_of(slot) if slot in self._held else 0

    def shared_of(self, slot: int) -> int:
        """Columns that a slot reads from a shared beginning."""
        return self.beginning_of(slot)[1]

    def beginning_of(self, slot: int) -> tuple[int, int]:
        """The key of the beginning that a slot reads, and how many columns of it; zeros where there is none."""
        return self._shared.get(slot, (0, 0))

    def strands(self, slot: int, columns: int, free: list[int]) -> bool:
        """Whether who read the first `columns` of a slot's canvas where they stand would keep more than these: all of a beginning
        of which no slot but `free` ones reads the rest."""
        key, shared = self.beginning_of(slot)
        if not shared or min(columns, shared) == self._held[key][1]:
            return False
        return all(other in free for other, (each, _) in self._shared.items() if each == key)

    @property
    def free(self) -> int:
        """Columns that no extent has."""
        return self.columns - 1 - sum(size for _, size in self._held.values())

    def held_by(self, slots: list[int]) -> int:
        """Columns that would be free without these slots."""
        others = self._shared.keys() - slots
        keys = {*slots, *(key for key, _ in self._shared.values())} - {self._shared[slot][0] for slot in others}
        return sum(self._held[key][1] for key in keys if key in self._held)

    def acquire(self, slot: int, size: int) -> bool:
        """Give a slot an extent for a canvas of `size` columns, instead of the one that it has; what it shares it goes on
        sharing. False where there is no room, and it then has none."""
        self._held.pop(slot, None)
        size -= self.shared_of(slot)
        is_possible = size <= self.free
        if is_possible:
            begin = self._gap(size)
            if begin is None:
                self._close_gaps()
                begin = self._gap(size)
            assert begin is not None
            self._held[slot] = begin, size
        self._changed.add(slot)
        return is_possible

    def shrink(self, slot: int, size: int) -> None:
        """Take the last columns of a canvas away."""
        self._held[slot] = self._held[slot][0], size - self.shared_of(slot)
        self._changed.add(slot)

    def share(self, source: int, target: int, columns: int) -> None:
        """Let a slot read the first columns of another one's canvas where they stand, as many of `columns` as the other does
        not itself read as the first part of a shorter beginning. The slot loses what it has."""
        self.release(target)
        if source not in self._shared:
            (begin, size), key = self._held[source], next(self._keys)
            self._held |= {key: (begin, columns), source: (begin + columns, size - columns)}
            self._shared[source] = key, columns
        key, known = self._shared[source]
        self._shared[target] = key, min(columns, known)
        self._changed |= {source, target}

    def release(self, slot: int) -> None:
        """Take a slot's extent away, and its part in a beginning."""
        key, _ = self._shared.pop(slot, (None, 0))
        if key is not None and all(other != key for other, _ in self._shared.values()):
            del self._held[key]
        if self._held.pop(slot, None) or key is not None:
            self._changed.add(slot)

    def upload(self) -> None:
        """Tell the device where the canvases of slots are; before a pass. The whole table at once: numbers that are written one
        by one would each wait for all that the device has to do."""
        if not self._changed:
            return
        for slot in self._changed:
            key, shared = self._shared.get(slot, (None, 0))
            row = [0, 1, 0, 0]
            if slot in self._held:
                row[:2] = self._held[slot][0] - shared, self.size_of(slot)
                row[2:] = (0 if key is None else self._held[key][0]), shared
            self._table[:, slot] = torch.tensor(row)
        self._changed.clear()
        self.table.copy_(uploaded(self._table, self.table.device))

    def _gap(self, size: int) -> int | None:
        """The first column of the smallest gap that is large enough, so that large ones stay whole."""
        gaps, end = [], 1
        for begin, held in [*sorted(self._held.values()), (self.columns, 0)]:
            if begin - end >= size:
                gaps.append((begin - end, end))
            end = begin + held
        return min(gaps)[1] if gaps else None

    def _close_gaps(self) -> None:
        moves, end = {}, 1
        for (begin, size), key in sorted((place, key) for key, place in self._held.items()):
            if begin > end:
                moves[key] = (begin, end, size)
            end += size
        if moves:
            self._move(list(moves.values()))
        self._held |= {key: (target, size) for key, (_, target, size) in moves.items()}
        self._changed |= set(range(self._table.shape[1]))
