"""How many drafts are worth what their rows cost on a device, for `draft_steps="auto"`."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .configuration import DiffusionGenerationConfig
from .contract import StepForward
from .graphs import capture
from .ranks import ranks_of

# How many times fewer passes so many drafts took on the Shakespeare checkpoints of LLaDA and Dream, in the mean of both, one token
# a step (benchmarks/draft_steps.py).
FEWER_PASSES = (1.0, 1.43, 1.63, 1.8, 1.88)
# Of a pass with drafts. More take every GPU longer to compute than to read the weights.
MOST_TOKENS = 1024
REPEATS = 7

# By the forward pass that steps run on, and the tokens of a step: the number of drafts.
_known: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def room_for_drafts(
    draft_steps: int | str | None,
    model: Any,
    fused: StepForward | None,
    options: DiffusionGenerationConfig,
    shape: tuple[int, int],
) -> tuple[int, int | None]:
    """How many drafts a canvas has at most, and up to how many tokens drafts fill a pass (None: no limit).

    Args:
        draft_steps: see [`DiffusionGenerationConfig`]. With `"auto"` it is measured once on a GPU what passes with 0 to 4 drafts
            cost; a CPU computes as long as it has rows.
        fused: what steps run on, if not on the model's own forward pass.
        options: say what a step feeds of a canvas.
        shape: the canvases that are decoded together, and their columns.
    """
    if draft_steps != "auto":
        return int(draft_steps or 0), None
    if model.device.type != "cuda":
        return 0, None
    rows, columns = shape
    tokens = rows * (columns if options.cache_policy == "none" else min(options.block_length or columns, columns))
    known = _known.setdefault(model if fused is None else fused, {})
    if tokens not in known:
        sizes = [tokens * (1 + drafts) for drafts in range(len(FEWER_PASSES)) if tokens * (1 + drafts) <= MOST_TOKENS]
        number = most_worth(pass_times(model, fused, sizes)) if len(sizes) > 1 else 0
        ranks = ranks_of(model)
        known[tokens] = number if ranks is None else ranks.least(number, model.device)
    return len(FEWER_PASSES) - 1, tokens * (1 + known[tokens])


def most_worth(times: list[float]) -> int:
    """The number of drafts with which a text takes least time. `times`: of a pass with 0, 1, ... drafts."""
    return min(range(len(times)), key=lambda number: times[number] / FEWER_PASSES[number])


@torch.no_grad()
def pass_times(model: Any, fused: StepForward | None, sizes: list[int]) -> list[float]:
    """Milliseconds of a pass over so many tokens: of the feed-forward networks of all layers, most of the weights that it reads and
    more than a GPU's cache holds, or of the model's own forward pass."""
    network, times = getattr(fused, "network", None), []
    device, config = model.device, model.config
    generator = torch.Generator(device).manual_seed(0)  # the caller's draws stay what they are
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for size in sizes:
            if network is None:
                ids = torch.randint(config.vocab_size, (1, size), generator=generator, device=device)
                times.append(milliseconds(partial(model, input_ids=ids, logits_to_keep=1)))
                continue
            x = torch.randn(1, size, config.hidden_size, generator=generator, device=device).to(model.dtype)
            times.append(milliseconds(replaying(partial(_run_networks, network, config.num_hidden_layers, x))))
    return times


def _run_networks(network: Callable, layers: int, x: torch.Tensor) -> None:
    for index in range(layers):
        network(index, x)


def replaying(run: Callable[[], None]) -> Callable[[], object]:
    """As steps run, without the time in which the host launches kernels."""
    run()  # compiles what is not compiled
    torch.cuda.synchronize()
    try:
        return capture(run, torch.cuda.graph_pool_handle(), torch.cuda.Stream()).replay
    except RuntimeError:  # steps are not captured either, and say so
        return run


def milliseconds(run: Callable[[], object]) -> float:
    """The median of a few runs after another one, on the device's own clock."""
    times = []
    for _ in range(1 + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])
