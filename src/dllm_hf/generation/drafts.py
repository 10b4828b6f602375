"""Draft and verify: several denoising steps in one forward pass, with the tokens of one step at a time.

The logits of a step say where the next ones would lead if they did not change: the best proposal is transferred, the two
best, and so on. These canvases are the drafts. The next pass feeds the canvas and its drafts, as rows that share what the
cache holds of the others' columns. Where the step from the canvas leads to the first draft, the logits of that draft are those
of the next step, and so on; the first draft that is wrong ends it. FreeDave (arXiv:2510.00294), self-speculative decoding
(arXiv:2510.04147) and Spiffy (arXiv:2509.18085) do the same.
"""

import torch

from .canvas import Canvas
from .configuration import DiffusionGenerationConfig
from .remasking import STRATEGIES
from .window import Window

# Tokens of a pass beside the reading of the weights: a matrix product of so many rows takes a GPU about as long as one of a few.
FREE_TOKENS = 128
AUTO_DRAFTS = 4


def confirmed(copies: torch.Tensor, now: torch.Tensor, nexts: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Which steps of a pass are those that one step at a time would have made.

    Args:
        copies: `(canvases, 1 + drafts)`, see [`Window`].
        now, nexts: `(rows, block)`, the tokens of each row's block before and after its step.
        moves: `(rows,)` bool, whether the step transfers anything.

    Returns:
        `(canvases, 1 + drafts)` bool: the first, from the canvas itself, and those from drafts that the step before leads to.
    """
    is_right = (nexts[copies[:, :-1]] == now[copies[:, 1:]]).all(-1) & moves[copies[:, 1:]]
    return torch.nn.functional.pad(is_right, (1, 0), value=True).long().cumprod(-1).bool()


def number_of_drafts(draft_steps: int | str | None, device: torch.device) -> int:
    """How many drafts a canvas has at most. A CPU computes as long as it has rows."""
    if draft_steps == "auto":
        return AUTO_DRAFTS if device.type == "cuda" else 0
    return int(draft_steps or 0)


def why_not(options: DiffusionGenerationConfig) -> str | None:
    """What of the options of a row keeps its steps from being drafted, and what to do; None where nothing does."""
    strategy = STRATEGIES[options.remasking_strategy]
    named = f"`remasking_strategy={options.remasking_strategy!r}`"
    if strategy.is_adaptive:
        static = [name for name, each in STRATEGIES.items() if not each.is_adaptive and each.confidence != "random"]
        return f"with {named} it depends on the logits how many tokens a step transfers: choose one of {', '.join(static)}"
    if strategy.confidence == "random" or options.alg_temp:
        asked = named if strategy.confidence == "random" else f"`alg_temp={options.alg_temp}`"
        return f"with {asked} each step draws the positions that receive a token: choose another strategy, without `alg_temp`"
    if options.sampling_temperature > 0:
        return f"with `temperature={options.sampling_temperature}` each step draws its tokens: set `temperature=0`"
    if options.editing_threshold is not None:
        return "with `editing_threshold` it depends on the logits how many steps a block takes: leave it out"
    if options.use_block_cache:
        return "with `use_block_cache=True` a step reads what the step before has written to the cache: leave it out"
    return None


def check_drafts(options: DiffusionGenerationConfig) -> None:
    """Raises a `ValueError` for options that ask for drafts where there can be none."""
    reason = why_not(options) if options.draft_steps else None
    if reason is not None:
        raise ValueError(
            f"`draft_steps={options.draft_steps!r}` takes several steps in one forward pass where it is known before the pass "
            f"what they depend on, but {reason}, or leave `draft_steps` out."
        )


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
        rows = window.copies.gather(1, same.long().argmax(-1, keepdim=True))[:, 0]
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
