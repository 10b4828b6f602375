"""Where the columns of each slot are in an arena that all slots share."""

from collections.abc import Callable

import torch

from .uploads import uploaded


class Extents:
    """Gives slots runs of columns of one arena. A canvas' length is known before a row begins, so that a row has one extent,
    from its admission to its end. Gaps between extents are closed by moving extents when a new one does not fit otherwise.

    The arena's first column is the scratch column of slots without an extent.

    Args:
        slots: slots that may have an extent.
        columns: of the arena.
        longest: no extent is longer.
        move: copies runs of columns, a list of `(source, target, size)`, to lower ones, which stand one behind the other and
            may overlap their sources.

    Attributes:
        base, size: `(slots,)`, first column and number of columns of each slot's extent, on the device; a captured step reads
            them, so that it does not depend on what the extents are.
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
        self._table = torch.tensor([[0], [1]]).repeat(1, slots)
        self._on_device = self._table.to(device)
        self.base, self.size = self._on_device
        self._held: dict[int, tuple[int, int]] = {}

    def begin_of(self, slot: int) -> int:
        return self._held[slot][0]

    def size_of(self, slot: int) -> int:
        """Columns that a slot has; 0 without an extent."""
        return self._held.get(slot, (0, 0))[1]

    @property
    def free(self) -> int:
        """Columns that no extent has."""
        return self.columns - 1 - sum(size for _, size in self._held.values())

    def acquire(self, slot: int, size: int) -> bool:
        """Give a slot an extent, instead of the one that it has. False where there is no room, and it then has none."""
        self.release(slot)
        if size > self.free:
            return False
        begin = self._gap(size)
        if begin is None:
            self._close_gaps()
            begin = self._gap(size)
        assert begin is not None
        self._put(slot, begin, size)
        self._upload()
        return True

    def shrink(self, slot: int, size: int) -> None:
        """Take the last columns of an extent away."""
        self._put(slot, self.begin_of(slot), size)
        self._upload()

    def release(self, slot: int) -> None:
        if self._held.pop(slot, None) is not None:
            self._table[:, slot] = torch.tensor([0, 1])
            self._upload()

    def _put(self, slot: int, begin: int, size: int) -> None:
        self._held[slot] = begin, size
        self._table[:, slot] = torch.tensor([begin, size])

    def _upload(self) -> None:
        """Not number by number: each would wait for all that the device has to do."""
        self._on_device.copy_(uploaded(self._table, self._on_device.device))

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
        for begin, slot in sorted((begin, slot) for slot, (begin, _) in self._held.items()):
            if begin > end:
                moves[slot] = (begin, end, self.size_of(slot))
            end += self.size_of(slot)
        if moves:
            self._move(list(moves.values()))
        for slot, (_, target, size) in moves.items():
            self._put(slot, target, size)
