"""How many drafts are worth what their rows cost on a GPU, for `draft_steps="auto"`."""

import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .configuration import DiffusionGenerationConfig
from .drafts import FREE_TOKENS
from .graphs import capture
from .ranks import ranks_of

# How many times fewer passes so many drafts took on the Shakespeare checkpoints of LLaDA and Dream, in the mean of both, one token
# a step (benchmarks/draft_steps.py).
FEWER_PASSES = (1.0, 1.43, 1.63, 1.8, 1.88)
# Of a pass with drafts. More take every GPU longer to compute than to read the weights.
MOST_TOKENS = 1024

# By the kernels that steps run on, and the tokens of a step: the number of drafts.
_known: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def room_for_drafts(
    draft_steps: int | str | None, model: Any, fused: Any, options: DiffusionGenerationConfig, shape: tuple[int, int]
) -> tuple[int, int | None]:
    """How many drafts a canvas has at most, and up to how many tokens drafts fill a pass (None: no limit).

    Args:
        draft_steps: see [`DiffusionGenerationConfig`]. With `"auto"` it is measured once on a GPU, where steps run on our kernels,
            what passes with 0 to 4 drafts cost; a CPU computes as long as it has rows.
        fused: the kernels that steps run on; None: the model's own forward pass.
        options, shape: see [`tokens_of_step`].
    """
    if draft_steps != "auto":
        return int(draft_steps or 0), None
    if model.device.type != "cuda":
        return 0, None
    most = len(FEWER_PASSES) - 1
    if options.cache_policy == "none" or not hasattr(fused, "network"):
        return most, FREE_TOKENS
    tokens, known = tokens_of_step(model, options, shape), _known.setdefault(fused, {})
    if tokens not in known:
        sizes = [tokens * canvases for canvases in range(1, 2 + most) if tokens * canvases <= MOST_TOKENS]
        number = most_worth(pass_times(model, fused, sizes)) if len(sizes) > 1 else 0
        ranks = ranks_of(model)
        known[tokens] = number if ranks is None else ranks.least(number, model.device)
    return (most, tokens * (1 + known[tokens])) if known[tokens] else (0, None)


def tokens_of_step(model: Any, options: DiffusionGenerationConfig, shape: tuple[int, int]) -> int:
    """How many tokens a step feeds that feeds blocks alone, and the column before where that predicts their first token.

    Args:
        shape: the canvases that are decoded together, and their columns.
    """
    rows, columns = shape
    before = 0 if model.sees_earlier_blocks else model.logits_shift
    return rows * min((options.block_length or columns) + before, columns)


def most_worth(times: list[float]) -> int:
    """The number of drafts with which a text takes least time. `times`: of a pass with 0, 1, ... drafts."""
    return min(range(len(times)), key=lambda number: times[number] / FEWER_PASSES[number])


@torch.no_grad()
def pass_times(model: Any, fused: Any, sizes: list[int]) -> list[float]:
    """Milliseconds that the feed-forward networks of all layers take for so many tokens: most of the weights that a pass reads, and
    more than a GPU's cache holds."""
    device, config, times = model.device, model.config, []
    generator = torch.Generator(device).manual_seed(0)  # the caller's draws stay what they are
    for size in sizes:
        x = torch.randn(1, size, config.hidden_size, generator=generator, device=device).to(model.dtype)
        run = partial(_run_networks, fused.network, config.num_hidden_layers, x)
        with torch.cuda.device(device):
            times.append(milliseconds(replaying(run)))
    return times


def _run_networks(network: Callable, layers: int, x: torch.Tensor) -> None:
    for index in range(layers):
        network(index, x)


def replaying(run: Callable[[], None]) -> Callable[[], object]:
    """As steps run: without the time in which the host launches kernels."""
    run()  # compiles what is not compiled
    torch.cuda.synchronize()
    try:
        return capture(run, torch.cuda.graph_pool_handle(), _stream(torch.cuda.current_device())).replay
    except RuntimeError:  # steps are not captured either, and say so
        return run


def milliseconds(run: Callable[[], object], repeats: int = 10, warmup: int = 2) -> float:
    """The median of `repeats` runs after `warmup` others, on the device's own clock."""
    times = []
    for _ in range(warmup + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warmup:])


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """Of all measurements. With a graph cuBLAS' workspace of its stream is freed, which the graphs of steps must not share: those
    are captured on streams of the other priority."""
    return torch.cuda.Stream(device, priority=-1)
