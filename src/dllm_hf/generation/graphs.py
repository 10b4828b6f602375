"""Denoising steps as CUDA graphs: one launch for a whole step, from the canvas back to the canvas.

A graph replays recorded operations on the recorded tensors. So the inputs of a step are copied into buffers of the graph
before each replay, and canvas and cache are buffers that outlive a call, see [`pool`].
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers.utils import logging

from ..fused.joint_products import lock
from ..kernels.ahead import without_collection
from ..kernels.triton import triton
from .window import TENSORS, Window

logger = logging.get_logger(__name__)

# Larger steps are not launch-bound: the host keeps ahead of the GPU without a graph. (A step of SDAR-4B takes the host 30 ms,
# and an H100 as long at 2,000 tokens.)
MAX_CAPTURED_TOKENS = 4096
MAX_GRAPHS = 128


def are_possible(device: torch.device) -> bool:
    """Whether steps can run as graphs on our kernels: on NVIDIA GPUs from Ampere on, with Triton installed."""
    if device.type != "cuda" or triton is None or os.environ.get("DLLM_HF_CUDA_GRAPHS", "1") == "0":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


class StepInputs:
    """The inputs of a captured step, in buffers that stay: window and noise.

    Args:
        store: the noise buffers of all steps, by use and shape. Steps share them, since they never run side by side.
    """

    def __init__(self, window: Window, noise: dict[str, torch.Tensor], store: dict):
        tensors = {name: getattr(window, name).clone() for name in TENSORS}
        # The graph is replayed for other slots too.
        self.window = replace(window, is_every_slot=False, **tensors)
        self.latest = window
        self.noise = {use: store.setdefault((use, each.shape), each.clone()) for use, each in noise.items()}

    def update(self, window: Window, noise: dict[str, torch.Tensor]) -> None:
        if window is not self.latest:  # most steps of a block share a window
            for name in TENSORS:
                getattr(self.window, name).copy_(getattr(window, name))
            self.latest = window
        for use, each in noise.items():
            self.noise[use].copy_(each)


class StepGraphs:
    """The graphs of one canvas and its cache. The first step of a shape runs without a graph, which warms it up; the second
    is captured, later ones replay it."""

    def __init__(self, device: torch.device):
        self.steps: OrderedDict[tuple, list] = OrderedDict()
        self.noise: dict[tuple, torch.Tensor] = {}
        self.pool_and_stream: tuple | None = (None, None)  # None: steps run without graphs
        if device.type == "cuda":
            # A new stream: cuBLAS keeps a workspace for each stream, which is freed with the first graph that was captured
            # on it (https://github.com/pytorch/pytorch/issues/193402).
            self.pool_and_stream = (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))

    def run(
        self,
        key: tuple,
        compute: Callable[[Window, dict[str, torch.Tensor]], None],
        window: Window,
        noise: dict[str, torch.Tensor],
    ) -> None:
        """Run `compute(window, noise)`. `key`: what its operations depend on besides the shapes."""
        key = (key, window.longest, window.draft_columns, *(getattr(window, name).shape for name in TENSORS))
        inputs, graph, runs = self.steps.pop(key, None) or (StepInputs(window, noise, self.noise), None, 0)
        inputs.update(window, noise)
        run = lambda: compute(inputs.window, inputs.noise)
        if runs == 1 and self.pool_and_stream is not None:
            try:
                graph = capture(run, *self.pool_and_stream)
            except RuntimeError as error:
                # An operation synchronises with the device, as experts or quantised weights may: no graphs.
                logger.warning_once(f"A denoising step could not be captured in a CUDA graph: {error}")
                self.pool_and_stream = None  # the memory pool cannot be used again
        run() if graph is None else graph.replay()
        self.steps[key] = [inputs, graph, runs + 1]  # at the end: used last
        if len(self.steps) > MAX_GRAPHS:
            self.steps.popitem(last=False)


def capture(run: Callable[[], None], pool, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # A graph of several GPUs that is collected meanwhile would end the capture.
        with without_collection(), lock:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                run()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may not restore it
    return graph
