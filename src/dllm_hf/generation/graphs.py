"""Denoising steps as CUDA graphs: a launch for a whole step, from the canvas back to the canvas.

A graph repeats what was recorded with the tensors that were recorded. So tokens, cache and what a step is told stand in
buffers that outlive the call: [`StepGraphs`]. A model keeps a few of them for its next calls, as long as it lives.
"""

import copy
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..kernels.attention import triton
from .cache import CanvasCache
from .canvas import Block, Canvas, Window, still_open
from .sampling import Noise

logger = logging.get_logger(__name__)

# Tokens of a forward pass. Above, the GPU is busy long enough for the host to keep ahead of it without a graph.
MOST_ROWS = 1024
GRAPHS_OF_A_CACHE = 16
CACHES_OF_A_MODEL = 2

# One capture at a time is possible in a process. Taken again inside of itself by what the garbage collector runs.
lock = threading.RLock()
_idle: "weakref.WeakKeyDictionary[torch.nn.Module, list[StepGraphs]]" = weakref.WeakKeyDictionary()


def are_possible(device: torch.device) -> bool:
    """Whether steps can run as graphs on our kernels: on NVIDIA's GPUs from Ampere on, where Triton is installed."""
    if device.type != "cuda" or triton is None or os.environ.get("DLLM_HF_CUDA_GRAPHS", "1") == "0":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def capacity_for(width: int, step: int) -> int:
    """Columns to make room for, a multiple of `step`: calls of about the same length share their graphs. `width`: the
    column behind included."""
    return -(-(width - 1) // step) * step + 1


@dataclass
class StepInputs:
    """What a step is told.

    columns, targets: `(batch, block)`, the block's columns, and where its tokens are written: what only repeats a column
        goes to the one that is nobody's.
    allowed, shown: `(batch, block)` bool, the positions that may receive a token, and those that the output shows.
    quota: `(batch,)`.
    window, keep: as in [`Window`].
    lengths: `(batch, window)` int32, the columns that each token of the window sees.
    given: `(batch, window)` bool, the tokens that came with the prompt.
    settled: `(batch, 1)`, the column up to which the canvas is final; the window's first one where no more is than in the
        last window.
    """

    columns: torch.Tensor
    targets: torch.Tensor
    allowed: torch.Tensor
    shown: torch.Tensor
    quota: torch.Tensor
    window: torch.Tensor
    keep: torch.Tensor
    lengths: torch.Tensor
    given: torch.Tensor
    settled: torch.Tensor


class RecordedNoise:
    """The random numbers of a step in buffers: the first run of a step says which it needs.

    Args:
        store: the buffers of all steps of a cache, by kind, order in the step and shape. Steps never run side by side.
    """

    def __init__(self, store: dict[tuple, torch.Tensor]):
        self.store, self.keys, self.next = store, [], 0

    def draw(self, source: Noise) -> None:
        """Before each run: what the step by itself would draw."""
        for key in self.keys:
            self.store[key].copy_(getattr(source, key[0])(key[2]))
        self.source, self.next = source, 0

    def uniform(self, shape) -> torch.Tensor:
        return self._take("uniform", shape)

    def gumbel(self, shape) -> torch.Tensor:
        return self._take("gumbel", shape)

    def _take(self, kind: str, shape) -> torch.Tensor:
        key = (kind, self.next, tuple(shape))
        if self.next == len(self.keys):
            drawn = getattr(self.source, kind)(shape)
            self.keys.append(key)
            self.store.setdefault(key, drawn)
            self.store[key].copy_(drawn)
        self.next += 1
        return self.store[key]


class Step:
    """A step of one shape: run as it is the first time, which warms it up, captured the second, replayed from then on."""

    def __init__(self, inputs: StepInputs, noise: RecordedNoise):
        self.inputs = StepInputs(**{name: tensor.clone() for name, tensor in vars(inputs).items()})
        self.latest, self.noise = inputs, noise
        self.graph: torch.cuda.CUDAGraph | None = None
        self.runs = 0
        self.constants: tuple = ()  # tensors of the call that was captured

    def run(
        self,
        compute: Callable[[StepInputs, RecordedNoise], None],
        inputs: StepInputs,
        noise: Noise,
        graphs: "StepGraphs",
    ) -> None:
        for name, buffer in vars(self.inputs).items():
            # Most of them change from block to block only.
            if getattr(inputs, name) is not getattr(self.latest, name):
                buffer.copy_(getattr(inputs, name))
        self.latest = inputs
        self.noise.draw(noise)
        self.runs += 1
        if self.runs == 2 and graphs.place is not None:
            try:
                self.graph = capture(lambda: compute(self.inputs, self.noise), *graphs.place)
            except RuntimeError as error:
                # Something in it looks at the device, as experts or quantised weights may: it runs without a graph.
                logger.warning_once(f"A denoising step could not be captured in a CUDA graph: {error}")
                self.noise.next, graphs.place = 0, None  # the memory pool cannot be used again
        if self.graph is None:
            compute(self.inputs, self.noise)
        else:
            self.graph.replay()
        self.noise.source = None  # it holds the caller's generators


def capture(run: Callable[[], None], pool, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with lock, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may leave the other one
    return graph


class StepGraphs:
    """The graphs of one cache, and the other buffers that they read and write.

    Args:
        cache: with room for `capacity` columns.
        rows, repeats: of the canvas, and how many of the cache for each of them.
        fingerprint: of the model whose steps they are, see [`fingerprint_of`].
    """

    def __init__(
        self,
        cache: CanvasCache,
        rows: int,
        repeats: int,
        capacity: int,
        device: torch.device,
        fingerprint: tuple | None,
    ):
        self.cache, self.rows, self.repeats, self.capacity, self.fingerprint = (
            cache,
            rows,
            repeats,
            capacity,
            fingerprint,
        )
        self.is_inference = torch.is_inference_mode_enabled()  # such buffers can be written in that mode only
        self.places: tuple | None = None
        # The column behind the last is nobody's.
        self.tokens = torch.zeros(rows, capacity + 1, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.row_forward_passes, self.row_transfers = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.saw_nan = torch.zeros((), dtype=torch.bool, device=device)
        self.steps: OrderedDict[tuple, Step] = OrderedDict()
        self.noise: dict[tuple, torch.Tensor] = {}
        self.place: tuple | None = (None, None)  # memory pool and stream to capture in; None: steps run as they are
        if device.type == "cuda":
            # A stream of its own: the workspace of the matrix products belongs to a stream, and goes with the first graph
            # that was captured there (https://github.com/pytorch/pytorch/issues/193402).
            self.place = (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))

    def __deepcopy__(self, memo) -> None:
        """A copy of a cache makes graphs of its own: these read the original's buffers."""

    def __reduce__(self) -> tuple:
        """A pickled cache has none either."""
        return type(None), ()

    def fits(self, model: torch.nn.Module, rows: int, width: int) -> bool:
        """Whether the graphs serve a canvas, and everything that they read is where it was."""
        return (
            self.rows == rows
            and self.capacity >= width
            and self.is_inference == torch.is_inference_mode_enabled()
            and self.fingerprint == fingerprint_of(model)
        )

    def retire(self) -> None:
        """The cache goes on without them: its buffers may move."""
        self.fingerprint = self.cache = None
        self.steps.clear()

    def begin(self, canvas: Canvas) -> None:
        """Take over a canvas: from now on its tokens stand here."""
        tokens = self.tokens[:, : canvas.width + 1]
        canvas.tokens = tokens.copy_(canvas.tokens)
        for buffer in (self.ended, self.row_forward_passes, self.row_transfers, self.saw_nan):
            buffer.zero_()

    def step(self, key: tuple, inputs: StepInputs, constants: tuple) -> Step:
        """The step that has the same `key`, or a new one. `constants`: tensors besides the inputs that it reads."""
        key = (key, inputs.columns.shape, inputs.window.shape)
        step = self.steps.pop(key, None) or Step(inputs, RecordedNoise(self.noise))
        self.steps[key] = step  # the latest last
        if len(self.steps) > GRAPHS_OF_A_CACHE:
            self.steps.popitem(last=False)
        if step.graph is None:
            step.constants = constants
        return step


class FastPath:
    """The steps of one call, on the graphs of its cache.

    Args:
        forward: `(tokens, columns, lengths, keep, given, settled) -> (batch, kept, vocab)`, a forward pass over a window.
            What it reads besides, the cache and the weights, stays in its place.
        forward_of_step: what does the same inside of a graph.
        fused: what `forward` runs the model with, see [`DiffusionGenerationMixin.step_forward`].
        block_length: of the blocks that a window which is block-causal inside consists of.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        forward: Callable,
        forward_of_step: Callable,
        canvas: Canvas,
        block_length: int,
        fused: Callable,
    ):
        self.graphs, self.forward, self.forward_of_step, self.canvas = graphs, forward, forward_of_step, canvas
        self.block_length, self.covers, self.kind = block_length, fused.covers, type(fused)
        self.block: Block | None = None
        self.window: Window | None = None
        graphs.begin(canvas)

    def takes(self, window: Window) -> bool:
        """Whether a step over this window is run as a graph."""
        return self.covers(window) and window.columns is not None and window.columns.numel() <= MOST_ROWS

    def logits(self, window: Window) -> torch.Tensor:
        """A forward pass without a graph."""
        columns = window.columns
        if columns is None:
            columns = torch.arange(self.canvas.width, device=self.canvas.tokens.device).expand(self.graphs.rows, -1)
        lengths, *others = self._about(window, columns)
        return self.forward(self.canvas.tokens.gather(1, columns), columns, lengths, window.keep, *others)

    def denoise(self, denoiser, block: Block, window: Window, allowed, quota, noise: Noise) -> None:
        """One step, as `Denoiser._denoise` does it. What is transferred is decided by `denoiser.decide`, which depends on
        `denoiser.settings` and the tensors in `denoiser.constants`."""
        graphs = self.graphs
        if self.block is not block:
            self.block, self.targets = block, torch.where(block.valid, block.columns, graphs.capacity)
        if self.window is not window:
            self.window, self.fed = window, window.columns
            width = window.columns.shape[1]
            if not window.is_block_causal and width > block.columns.shape[1] + 1:
                # Of `prefix`, whose windows shrink from block to block: fewer lengths, fewer graphs. A window may repeat
                # its last column.
                repeated = window.columns[:, -1:].expand(-1, -width % 64)
                self.fed = torch.cat([window.columns, repeated], dim=1)
            self.about = self._about(window, self.fed)
        inputs = StepInputs(
            block.columns, self.targets, allowed, block.shown, quota, self.fed, window.keep, *self.about
        )

        def compute(inputs: StepInputs, noise: RecordedNoise) -> None:
            tokens = graphs.tokens.gather(1, inputs.window)
            logits = self.forward_of_step(
                tokens, inputs.window, inputs.lengths, inputs.keep, inputs.given, inputs.settled
            )
            tokens = graphs.tokens.gather(1, inputs.columns)
            masked = (tokens == denoiser.config.mask_token_id) & inputs.allowed & ~graphs.ended[:, None]
            masked = still_open(masked, inputs.shown)
            proposals, transfer = denoiser.decide(logits, masked, inputs.quota, noise)
            graphs.tokens.scatter_(1, inputs.targets, torch.where(transfer, proposals, tokens))
            transferred = transfer.sum(-1)
            graphs.row_forward_passes += transferred > 0
            graphs.row_transfers += transferred

        graphs.step((self.kind, *denoiser.settings), inputs, denoiser.constants).run(compute, inputs, noise, graphs)

    def _about(self, window: Window, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`lengths`, `given` and `settled`, see [`StepInputs`]."""
        if window.is_block_causal:
            lengths = ((columns // self.block_length + 1) * self.block_length).clamp(max=window.visible)
        elif window.key_mask is not None:
            lengths = window.key_mask.sum(-1, keepdim=True).expand_as(columns)
        else:
            lengths = torch.full_like(columns, window.visible)
        settled = columns[:, :1] if window.settled is None else window.settled
        return lengths.to(torch.int32).contiguous(), self.canvas.given.gather(1, columns), settled


def fingerprint_of(model: torch.nn.Module) -> tuple:
    """Where a model's weights are, and its configuration: graphs read these places and do as it said, whatever the model
    holds later."""
    places = (tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    return (*places, model.config.to_json_string(use_diff=False))


def places_of(cache: CanvasCache) -> tuple:
    """Where a cache's tensors are."""
    own = (value for name, value in vars(cache).items() if name != "tokens")  # what it remembers, no graph reads
    held = [*cache.layer_tensors(), *(value for value in own if isinstance(value, torch.Tensor))]
    return tuple(tensor.data_ptr() for tensor in held)


def can_be_captured(model: torch.nn.Module) -> bool:
    """Whether a forward pass of the model is the same kernels every time, as far as can be seen: no hooks, adapters (which
    can be switched off), parts on other devices, or weights that autocast copies."""
    device = next(model.parameters()).device
    if torch.is_autocast_enabled(device.type) or {p.device for p in model.parameters()} != {device}:
        return False
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or hasattr(module, "_hf_hook")  # of accelerate
        or hasattr(module, "base_layer")  # of PEFT
        for module in model.modules()
    )


def take(
    model: torch.nn.Module, rows: int, repeats: int, width: int, make_cache: Callable[[int], CanvasCache]
) -> StepGraphs:
    """Graphs for a canvas, of an earlier call of this shape where there are some idle.

    Args:
        repeats: the cache has so many rows for each of the canvas.
    """
    fingerprint, capacity = fingerprint_of(model), capacity_for(width, model.capacity_step)
    with lock:
        idle = _idle.setdefault(model, [])
        idle[:] = [graphs for graphs in idle if graphs.fingerprint == fingerprint]
        for index, graphs in enumerate(idle):
            if (graphs.repeats, graphs.capacity) == (repeats, capacity) and graphs.fits(model, rows, width):
                graphs.cache.restart()
                return idle.pop(index)
    return StepGraphs(make_cache(capacity), rows, repeats, capacity, model.device, fingerprint)


def put_back(model: torch.nn.Module, graphs: StepGraphs) -> None:
    """Keep graphs for later calls, instead of the oldest if there are too many."""
    if graphs.fingerprint is None:  # retired
        return
    with lock:
        idle = _idle.setdefault(model, [])
        idle.append(graphs)
        del idle[:-CACHES_OF_A_MODEL]


def lend(model: torch.nn.Module, graphs: StepGraphs) -> CanvasCache:
    """The cache for the caller to go on from. Its graphs serve other calls when nobody has it any more."""
    cache = copy.copy(graphs.cache)
    cache.graphs, graphs.places = graphs, places_of(cache)
    weakref.finalize(cache, _give_back, weakref.ref(model), graphs, graphs.places).atexit = False
    return cache


def _give_back(model: weakref.ref, graphs: StepGraphs, places: tuple) -> None:
    # The caller may have reset the cache, or selected rows: its layers are those of the graphs.
    if model() is not None and graphs.cache is not None and places_of(graphs.cache) == places:
        put_back(model(), graphs)


def release(model: torch.nn.Module) -> None:
    """Give back the memory that a model keeps for its next calls."""
    with lock:
        _idle.pop(model, None)
