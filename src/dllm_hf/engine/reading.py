"""`Reading`: what a step has left on the canvas, on its way to the host while the next step runs."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch

from ..generation.canvas import Canvas, warn_of_nan
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


# Of one position: the log-probability of its token, and the most probable tokens with theirs.
Distribution = tuple[float, list[tuple[int, float]]]


class Reading:
    """Copies pieces of the canvas to the host. Nobody waits for the copy before it is iterated over."""

    def __init__(self, canvas: Canvas, pieces: list[Piece]):
        self.pieces, self._copied = pieces, None
        if not pieces:
            return
        starts = numpy.array([piece.start for piece in pieces])[:, None]
        offsets = numpy.arange(max(piece.end - piece.start for piece in pieces))
        columns = numpy.minimum(starts + offsets, canvas.capacity)
        lines = numpy.array([piece.row.slot for piece in pieces])[:, None]
        places = uploaded(torch.from_numpy(numpy.concatenate([lines, columns], axis=1)), canvas.device)
        place = places[:, :1], places[:, 1:]
        saw_nan = canvas.saw_nan.expand(len(pieces), 1)
        self._values = to_host(torch.cat([saw_nan, canvas.counts[places[:, 0]], canvas.tokens[place]], dim=1))
        asked = [piece.row.request.logprobs for piece in pieces if piece.row.request.logprobs is not None]
        names = ("own", "top", "top_tokens") if max(asked, default=0) else ("own",) if asked else ()
        self._logprobs = [to_host(canvas.logprobs[name][place]) for name in names]
        if canvas.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __iter__(self) -> Iterator[tuple[Piece, tuple[int, int], list[int], list[Distribution] | None]]:
        """Each piece with the counts of its row, see [`Canvas`], its tokens, and their distributions where its row asks."""
        if self._copied is not None:
            self._copied.synchronize()
        every = self._values.tolist() if self.pieces else ()
        for index, (piece, (saw_nan, passes, transferred, *tokens)) in enumerate(zip(self.pieces, every)):
            if saw_nan:
                warn_of_nan()
            yield piece, (passes, transferred), tokens[: piece.end - piece.start], self._distributions(index, piece)

    def _distributions(self, index: int, piece: Piece) -> list[Distribution] | None:
        asked, number = piece.row.request.logprobs, piece.end - piece.start
        if asked is None:
            return None
        own = self._logprobs[0][index, :number].tolist()
        if not asked:
            return [(each, []) for each in own]
        top, tokens = (each[index, :number, :asked].tolist() for each in self._logprobs[1:])
        # A small vocabulary does not fill the table.
        pairs = [[pair for pair in zip(*each) if pair[0] >= 0] for each in zip(tokens, top)]
        return list(zip(own, pairs))


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on its way to the host: from a GPU into pinned memory, without waiting."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
