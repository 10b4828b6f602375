"""How the benchmarks measure time on a GPU."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dllm_hf.generation.decoder import Decoder
from dllm_hf.generation.draft_costs import milliseconds  # noqa: F401  for the benchmarks


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A function that replays the kernels of `run` as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def pass_times() -> Iterator[dict[int, list[float]]]:
    """Milliseconds on the device of each forward pass of the calls inside, by the number of tokens that it feeds; there once they
    have ended. A pass that waits for the host is longer by that."""
    found, passes, run = defaultdict[int, list[float]](list), [], Decoder._run

    def timed(self, window, *arguments):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run(self, window, *arguments)
        events[1].record()
        passes.append((window.columns.numel(), events))

    Decoder._run = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Decoder._run = run  # type: ignore[method-assign]
    torch.cuda.synchronize()
    for tokens, (start, end) in passes:
        found[tokens].append(start.elapsed_time(end))
