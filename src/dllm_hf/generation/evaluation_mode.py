"""Evaluation mode for the time of a call, on a model that several threads may share."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_lock = threading.Lock()
# The number of running calls that need a module in evaluation mode, for modules that were in training mode before.
_calls: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


def in_training(every: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that are in training mode, or will return to it when calls end that are running."""
    with _lock:
        known = set(_calls)
        return [module for module in every if module.training or module in known]


@contextmanager
def evaluating(every: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode of modules, so that dropout cannot change the tokens. The modules that were in training mode return to it when
    the last of several overlapping calls ends."""
    with _lock:
        modules = [module for module in every if module.training or module in _calls]
        for module in modules:
            _calls[module] = _calls.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _calls[module] -= 1
                if not _calls[module]:
                    del _calls[module]
                    module.training = True
