"""How the benchmarks measure time on a GPU."""

import statistics
from collections.abc import Callable

import torch


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


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A function that replays the kernels of `run` as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
