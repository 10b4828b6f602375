"""`Reading`: what a step has left on the canvas, on its way to the host while the next step runs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..generation.canvas import Canvas
from ..generation.requests import Row
from ..generation.uploads import uploaded


class Piece(NamedTuple):
    """What is read of one row.

    start, end: a block that it has finished, or the one in which it was ended.
    passes: forward passes that it had taken part in.
    is_last: whether nothing of it is left to decode.
    """

    row: Row
    start: int
    end: int
    passes: int
    is_last: bool


class Reading:
    """Copies pieces of the canvas to the host. Nobody waits for the copy before it is iterated over."""

    def __init__(self, canvas: Canvas, pieces: list[Piece]):
        self.pieces, self._copied = pieces, None
        if not pieces:
            return
        starts = uploaded(torch.tensor([[piece.row.slot, piece.start] for piece in pieces]), canvas.device)
        offsets = torch.arange(max(piece.end - piece.start for piece in pieces), device=canvas.device)
        columns = (starts[:, 1:] + offsets).clamp(max=canvas.capacity)
        self._values = torch.cat([canvas.counts[starts[:, 0]], canvas.tokens[starts[:, :1], columns]], dim=1)
        if canvas.device.type == "cuda":
            host = torch.empty(self._values.shape, dtype=torch.long, pin_memory=True)
            self._values = host.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __iter__(self) -> Iterator[tuple[Piece, tuple[int, int], list[int]]]:
        """Each piece with the counts of its row, see [`Canvas`], and its tokens."""
        if self._copied is not None:
            self._copied.synchronize()
        for piece, (passes, transferred, *tokens) in zip(self.pieces, self._values.tolist() if self.pieces else ()):
            yield piece, (passes, transferred), tokens[: piece.end - piece.start]
