"""The buffers of decoding, from call to call: idle, in use, or held by a conversation.

A graph reads what stands where it stood, so that canvas, cache and graphs belong together: a [`Workspace`]. A model keeps
a few idle ones for its next calls, as long as it lives.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .cache import CanvasCache
from .canvas import Canvas
from .graphs import StepGraphs

MAX_IDLE = 2

# Taken again inside of itself: a finalizer (`_give_back`) may run while this thread holds it.
_lock = threading.RLock()
_idle: "weakref.WeakKeyDictionary[torch.nn.Module, list[Workspace]]" = weakref.WeakKeyDictionary()
_seen: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple, Any]]" = weakref.WeakKeyDictionary()


class Workspace:
    """Buffers of so many slots and columns, and the graphs that read them.

    Args:
        state: the cache, with room for `capacity` columns and the scratch column.
        key: what calls must have in common to share it: the model's fingerprint, slots, capacity, runs of guidance.
    """

    def __init__(self, canvas: Canvas, state: CanvasCache | None, key: tuple = ()):
        self.canvas, self.state, self.key = canvas, state, key
        self.graphs = StepGraphs(canvas.device)
        self.pointers: tuple = ()

    def __deepcopy__(self, memo) -> None:
        """A copy of a cache makes buffers of its own: these belong to the original."""

    def __reduce__(self) -> tuple:
        """A pickled cache has none either."""
        return type(None), ()


def capacity_for(width: int, step: int) -> int:
    """Columns to make room for, a multiple of `step`: calls of about the same length share their graphs."""
    return -(-width // step) * step


def acquire(model: torch.nn.Module, key: tuple, make: Callable[[], Workspace]) -> Workspace:
    """A workspace of this `key`, idle since an earlier call where there is one; its cache holds nothing."""
    with _lock:
        idle = _idle.setdefault(model, [])
        idle[:] = [each for each in idle if each.key[0] == key[0]]  # graphs go when the weights have moved
        for index, workspace in enumerate(idle):
            if workspace.key == key:
                workspace.state.restart()
                return idle.pop(index)
    return make()


def release(model: torch.nn.Module, workspace: Workspace) -> None:
    """Keep a workspace for later calls, instead of the oldest if there are too many."""
    with _lock:
        idle = _idle.setdefault(model, [])
        idle.append(workspace)
        del idle[:-MAX_IDLE]


def hold(model: torch.nn.Module, workspace: Workspace) -> CanvasCache:
    """The cache of a workspace for a conversation to go on from. The workspace serves other calls when nobody has the
    cache any more."""
    # A shallow copy: cache -> workspace -> cache would be a reference cycle.
    cache = copy.copy(workspace.state)
    cache.workspace, workspace.pointers = workspace, pointers_of(cache)
    weakref.finalize(cache, _give_back, weakref.ref(model), workspace, workspace.pointers).atexit = False
    return cache


def _give_back(model: weakref.ref, workspace: Workspace, pointers: tuple) -> None:
    # The conversation may have reset the cache, or selected rows: its layers are those of the workspace.
    if model() is not None and workspace.key and pointers_of(workspace.state) == pointers:
        release(model(), workspace)


def release_all(model: torch.nn.Module) -> None:
    """Give back the memory that a model keeps for its next calls."""
    with _lock:
        _idle.pop(model, None)


def pointers_of(cache: CanvasCache) -> tuple:
    """Where a cache's tensors are."""
    own = (value for name, value in vars(cache).items() if name != "tokens")  # what it remembers, no graph reads
    held = [*cache.layer_tensors(), *(value for value in own if isinstance(value, torch.Tensor))]
    return tuple(tensor.data_ptr() for tensor in held)


def fingerprint_of(model: torch.nn.Module) -> tuple:
    """All that decides what a forward pass of the model does, and where it reads its weights: graphs do as it was when they
    were captured, whatever the model holds later."""
    found: list = [str(vars(model.config)), torch.is_autocast_enabled(model.device.type), model.dtype]
    found.append(torch.is_inference_mode_enabled())  # buffers that were made in it can be written in it only
    for module in model.modules():
        held = vars(module)
        hooks = (bool(held["_forward_hooks"]), bool(held["_forward_pre_hooks"]), "forward" in held)
        found.append((type(module), len(held), *hooks))
        weights = (each for each in held["_parameters"].values() if each is not None)
        found.extend(getattr(each, "_local_tensor", each).data_ptr() for each in weights)
        found.extend(each.data_ptr() for each in held["_buffers"].values() if each is not None)
    return tuple(found)


def fused_of(model: torch.nn.Module) -> tuple[Any, tuple]:
    """What runs the model's steps, see [`DiffusionGenerationMixin.step_forward`], and the model's fingerprint. It is made
    once for a fingerprint: to look through a model of 8B parameters takes milliseconds."""
    fingerprint = fingerprint_of(model)
    known = _seen.get(model)
    if known is None or known[0] != fingerprint:
        fused = model.step_forward()
        fingerprint = fingerprint_of(model)  # it may have put weights side by side
        _seen[model] = known = (fingerprint, fused)
    return known[1], fingerprint
