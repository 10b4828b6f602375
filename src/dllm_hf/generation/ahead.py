"""Logits of canvases that a caller has not come to yet."""

import torch

from .canvas import Canvas
from .window import Window


class Ahead:
    """The logits of a pass with drafts, for a caller that watches each step: a step makes no forward pass if its canvas was
    among those of the last one.

    It is kept as long as the graphs that write its logits.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._window: Window | None = None
        self._texts: torch.Tensor

    def forget(self) -> None:
        self._window = None

    def find(self, window: Window, canvas: Canvas) -> torch.Tensor | None:
        """The logits of all canvases of a window, `(canvases, block, vocab)`, or None if the last pass was over another window,
        or has not had one of them."""
        if window is not self._window:
            return None
        same = (self._texts == canvas.tokens[window.slots[window.copies[:, :1]], : canvas.capacity]).all(-1)
        if not bool(same.any(-1).all()):
            return None
        return self.logits_of(window, window.copies.gather(1, same.long().argmax(-1, keepdim=True))[:, 0])

    def logits_of(self, window: Window, rows: torch.Tensor) -> torch.Tensor:
        """Those of some rows of the pass over a window, `(rows, block, vocab)`."""
        return self._buffers[window.block.shape][rows]

    def note(self, window: Window, canvas: Canvas) -> None:
        """Note the canvases of a pass before it is made."""
        lines = window.slots + window.draft * canvas.slots
        self._window, self._texts = window, canvas.tokens[lines[window.copies], : canvas.capacity]

    def keep(self, logits: torch.Tensor) -> None:
        """Keep the logits of a pass, `(rows, block, vocab)`, where a graph finds the same memory again."""
        shape = logits.shape[:2]
        if shape not in self._buffers:
            self._buffers[shape] = torch.empty_like(logits)
        self._buffers[shape].copy_(logits)
