"""Token editing (LLaDA2.1, arXiv:2602.08676, https://github.com/inclusionAI/LLaDA2.X): tokens of a block may be replaced until it is done."""

import torch

from .canvas import NUMBERS, Canvas
from .configuration import DiffusionGenerationConfig
from .contract import DenoisingModel, models_with
from .remasking import STRATEGIES
from .window import Window

MAX_POST_STEPS = 16  # of LLaDA2.1's `generate`, where the caller says nothing


def check_editing(model: DenoisingModel, options: DiffusionGenerationConfig) -> None:
    """Fill in `max_post_steps`. Raises a `ValueError` for options that ask for editing where there can be none."""
    if options.editing_threshold is None:
        if options.max_post_steps is not None:
            raise ValueError(
                f"`max_post_steps={options.max_post_steps}` bounds the editing of tokens: give an `editing_threshold` as "
                "well, or leave it out."
            )
        return
    asked = f"`editing_threshold={options.editing_threshold}`"
    if not model.supports_editing:
        raise ValueError(
            f"{asked} is not possible with {type(model).__name__}, whose tokens are final once they are transferred. "
            f"Models that edit tokens: {models_with('supports_editing')}. Leave it out."
        )
    if STRATEGIES[options.remasking_strategy].confidence != "probability":
        names = [name for name, strategy in STRATEGIES.items() if strategy.confidence == "probability"]
        raise ValueError(
            f"{asked} is compared with probabilities, which `remasking_strategy={options.remasking_strategy!r}` does not "
            f"read: choose one of {', '.join(names)}."
        )
    if options.max_post_steps is None:
        options.max_post_steps = MAX_POST_STEPS


def edit(
    canvas: Canvas,
    window: Window,
    now: torch.Tensor,
    masked: torch.Tensor,
    proposals: torch.Tensor,
    scores: torch.Tensor,
    is_stepping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of a block are replaced in a step, and whether it goes on afterwards even if no mask is left.

    A block without masks goes on until a step has replaced nothing, and for `max_post_steps` steps at most. Tokens of the
    prompt are never replaced.

    Args:
        now: `(rows, block)`, the block's tokens before the step; `masked`: bool, its masks.
        proposals, scores: `(rows, block)`, and their probabilities.
        is_stepping: `(rows, 1)` bool, the rows that take part in the step.

    Returns:
        `(rows, block)` and `(rows,)` bool.
    """
    slots = window.slots
    threshold, limit = editing_numbers(canvas, window)
    is_own = (window.block < canvas.capacity) & ~canvas.is_prompt[slots[:, None], window.block] & ~masked
    had_masks, before = masked.any(-1, keepdim=True), canvas.post_steps[slots][:, None]
    count = torch.where(had_masks, 0, before + 1)
    replaced = is_own & (proposals != now) & (scores > threshold) & (count <= limit) & is_stepping
    # Nothing changes in a step that would repeat one in which nothing changed.
    count = torch.where(had_masks | replaced.any(-1, keepdim=True), count, limit)
    canvas.post_steps.index_copy_(0, slots, torch.where(is_stepping, count, before)[:, 0])
    return replaced, (count < limit)[:, 0]


def editing_numbers(canvas: Canvas, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows, 1)` each: the probability above which a token is replaced, 1 in rows without editing, and `max_post_steps`."""
    numbers = canvas.numbers[window.slots]
    names = ("editing_threshold", "max_post_steps")
    threshold, limit = (numbers[:, NUMBERS.index(name), None] for name in names)
    return threshold, limit.long()
