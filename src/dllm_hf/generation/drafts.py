"""Draft and verify: several denoising steps in one forward pass, with the tokens of one step at a time.

The logits of a step say where the next ones would lead if they did not change: to the canvas with the best proposal, with the
two best, and so on, and if the order alone changed, to that with the second best. These canvases are the drafts. The next pass
feeds the canvas and its drafts, as rows that share what the cache holds of the others' columns. Where the step from the canvas
leads to a draft, the logits of that draft are those of the next step, and so on. FreeDave (arXiv:2510.00294) and
self-speculative decoding (arXiv:2510.04147) do it with the best proposals in their order, Spiffy (arXiv:2509.18085) with others
beside them.
"""

import torch

from .configuration import DiffusionGenerationConfig
from .remasking import STRATEGIES, Strategy

# Tokens of a pass beside the reading of the weights: a matrix product of so many rows takes a GPU about as long as one of a few.
FREE_TOKENS = 128
# Of the steps after the next one, those whose proposals each draft holds. Each is, of those that are not there yet, about the
# one that saves most passes on the Shakespeare checkpoints, benchmarks/draft_steps.py.
DRAFTS = ((0,), (0, 1), (1,), (0, 1, 2), (0, 2), (2,), (1, 2), (0, 1, 2, 3))


def drafts_of(strategy: Strategy, number: int) -> list[tuple[int, ...]]:
    """What each of so many drafts holds, see `DRAFTS`. Where no score orders the positions, their order does not change."""
    ordered = [tuple(range(1 + index)) for index in range(number)]
    return ordered if strategy.confidence is None else [*DRAFTS, *ordered[len(DRAFTS[-1]) :]][:number]


def confirmed(copies: torch.Tensor, level: torch.Tensor, now: torch.Tensor, nexts: torch.Tensor, moves: torch.Tensor):
    """Which steps of a pass are those that one step at a time would have made.

    Args:
        copies: `(canvases, 1 + drafts)`, see [`Window`].
        level: `(rows,)`, how many steps each row is ahead of its canvas.
        now, nexts: `(rows, block)`, the tokens of each row's block before and after its step.
        moves: `(rows,)` bool, whether the step transfers anything.

    Returns:
        `(canvases, 1 + drafts)` bool: the canvas itself, the draft that its step leads to, and so on.
    """
    level = level[copies]
    is_next = (level[:, :, None] + 1 == level[:, None]) & moves[copies][:, None]
    leads = (nexts[copies][:, :, None] == now[copies][:, None]).all(-1) & is_next
    leads &= leads.cumsum(-1) == 1  # drafts may be the same
    reached = taken = (level == 0) & (torch.arange(level.shape[1], device=level.device) == 0)
    for _ in range(level.shape[1] - 1):
        reached = (reached[:, :, None] & leads).any(1)
        taken = taken | reached
    return taken


def why_not(options: DiffusionGenerationConfig) -> str | None:
    """What of the options of a row keeps its steps from being drafted, and what to do; None where nothing does."""
    if options.self_speculation:
        return "with `self_speculation=True` it depends on the logits where the next block begins: leave it out"
    strategy = STRATEGIES[options.remasking_strategy]
    named = f"`remasking_strategy={options.remasking_strategy!r}`"
    if strategy.is_adaptive:
        static = [name for name, each in STRATEGIES.items() if not each.is_adaptive and each.confidence != "random"]
        return (
            f"with {named} it depends on the logits how many tokens a step transfers: choose one of {', '.join(static)}"
        )
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
