"""The buffers of decoding between calls: idle, in use, or held by a conversation.

A graph reads fixed addresses, so canvas, cache and graphs belong together: a [`Workspace`]. Each model keeps a few idle
workspaces for its next calls.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .ahead import Ahead
from .cache import CanvasCache, column_bytes_of
from .canvas import Canvas
from .contract import DenoisingModel, StepForward
from .graphs import StepGraphs

MAX_IDLE = 2
# Of SDAR-8B's weights half a GiB, 3,584 columns of one sequence.
SPARE = 1 / 32

# Reentrant: a finalizer (`_release_unless_changed`) may run while this thread holds the lock.
_lock = threading.RLock()
_idle: "weakref.WeakKeyDictionary[DenoisingModel, list[Workspace]]" = weakref.WeakKeyDictionary()
_fused: "weakref.WeakKeyDictionary[DenoisingModel, tuple[tuple, Any]]" = weakref.WeakKeyDictionary()


class Workspace:
    """Buffers of a number of slots and columns, and the graphs that read them.

    Args:
        state: the backend's, a cache of the canvas' columns and the scratch column.
        key: what calls that share it must have in common: the model's fingerprint, slots, capacity, copies for guidance, type of
            keys and values, drafts.

    Attributes:
        pointers: see [`pointers_of`], when a call last left the cache to a conversation.
    """

    def __init__(self, canvas: Canvas, state: Any, key: tuple = ()):
        self.canvas, self.state, self.key = canvas, state, key
        self.graphs, self.ahead = StepGraphs(canvas.device), Ahead()
        self.pointers: tuple = ()

    def __deepcopy__(self, memo) -> None:
        """None: the copy of a cache gets new buffers."""

    def __reduce__(self) -> tuple:
        """None: a pickled cache has no buffers."""
        return type(None), ()


def capacity_for(model: DenoisingModel, slots: int, width: int, cache_dtype: str | None = None) -> int:
    """The columns to allocate for rows of `width` columns, in steps of `capacity_step` or of what [`SPARE`] of the weights'
    memory holds, so that calls of about the same length, and the turns of a conversation, share their graphs."""
    spare = sum(parameter.nbytes for parameter in model.parameters()) * SPARE
    step = max(int(spare / (slots * column_bytes_of(model, cache_dtype))), 1)
    step = -(-step // model.capacity_step) * model.capacity_step
    return -(-width // step) * step


def acquire(model: DenoisingModel, key: tuple, make: Callable[[], Workspace]) -> Workspace:
    """An idle workspace of this `key`, or else a new one; its cache is empty."""
    with _lock:
        idle = _idle.setdefault(model, [])
        idle[:] = [each for each in idle if each.key[0] == key[0]]  # the weights have moved: graphs are stale
        for index, workspace in enumerate(idle):
            if workspace.key == key:
                workspace.state.restart()
                return idle.pop(index)
    return make()


def release(model: DenoisingModel, workspace: Workspace) -> None:
    """Keep a workspace for later calls, in exchange for the oldest if there are too many."""
    with _lock:
        idle = _idle.setdefault(model, [])
        idle.append(workspace)
        del idle[:-MAX_IDLE]


def hold(model: DenoisingModel, workspace: Workspace) -> CanvasCache:
    """The cache of a workspace, for a conversation to continue. The workspace is released when that cache is collected."""
    # A shallow copy: cache -> workspace -> cache would be a reference cycle.
    cache = copy.copy(workspace.state)
    cache.workspace, workspace.pointers = workspace, pointers_of(cache)
    weakref.finalize(cache, _release_unless_changed, weakref.ref(model), workspace, workspace.pointers).atexit = False
    return cache


def _release_unless_changed(model: weakref.ref, workspace: Workspace, pointers: tuple) -> None:
    # The layers are shared with the conversation's cache: release the buffers only if none was replaced.
    held = model()
    if held is not None and workspace.key and pointers_of(workspace.state) == pointers:
        release(held, workspace)


def release_all(model: DenoisingModel) -> None:
    """Free the idle workspaces of a model."""
    with _lock:
        _idle.pop(model, None)


def pointers_of(cache: CanvasCache) -> tuple:
    """The data pointers of a cache's tensors, as far as graphs read them."""
    own = (value for name, value in vars(cache).items() if name != "tokens")
    held = [*cache.layer_tensors(), *(value for value in own if isinstance(value, torch.Tensor))]
    return tuple(tensor.data_ptr() for tensor in held)


def fingerprint_of(model: DenoisingModel) -> tuple:
    """All that a captured forward pass depends on: configuration, modes, modules, hooks, and the addresses of weights. A
    graph replays the pass as it was captured, whatever the model holds later."""
    found: list = [str(vars(model.config)), torch.is_autocast_enabled(model.device.type), model.dtype]
    found.append(torch.is_inference_mode_enabled())  # buffers made in it can be written in it only
    for module in model.modules():
        held = vars(module)
        hooks = (
            *held["_forward_hooks"],
            None,
            *held["_forward_pre_hooks"],
            "forward" in held,
        )  # each hook has a number
        found.append((type(module), len(held), *hooks))
        weights = (each for each in held["_parameters"].values() if each is not None)
        found.extend(part.data_ptr() for each in weights for part in _parts_of(each))
        found.extend(each.data_ptr() for each in held["_buffers"].values() if each is not None)
    return tuple(found)


def version_of(model: DenoisingModel) -> tuple:
    """All that keys and values depend on besides the text: the fingerprint but for the configuration, into which the library
    writes, what adapters switch in modules, and how often weights have been changed in place, which PyTorch counts, though not
    for changes of `.data`."""
    switches = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (bool, int, float, str))
    ]
    weights = [each for weight in model.parameters() for each in _parts_of(weight) if not each.is_inference()]
    return fingerprint_of(model)[1:], switches, sum(each._version for each in weights)


def _parts_of(weight: Any) -> list[torch.Tensor]:
    """The tensors whose memory a weight stands in: a quantised one consists of several."""
    if hasattr(weight, "_local_tensor"):
        return [weight._local_tensor]
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]


def fused_of(model: DenoisingModel) -> tuple[StepForward | None, tuple]:
    """The model's `step_forward()`, made once for each fingerprint since that takes milliseconds for 8B parameters, and the
    model's fingerprint."""
    fingerprint = fingerprint_of(model)
    known = _fused.get(model)
    if known is None or known[0] != fingerprint:
        fused = model.step_forward()
        fingerprint = fingerprint_of(model)  # `step_forward` may have moved weights
        _fused[model] = known = (fingerprint, fused)
    return known[1], fingerprint
