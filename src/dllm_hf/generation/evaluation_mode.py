"""Evaluation mode for the time of a call, on a model that several threads may share."""

import threading
import weakref
from contextlib import contextmanager

from torch import nn

_lock = threading.Lock()
# Of modules that were training when a call began, how many calls want them in evaluation mode now.
_calls: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode, so that dropout cannot change the tokens. What was training does so again after the last of the
    calls that overlap."""
    with _lock:
        modules = [module for module in model.modules() if module.training or module in _calls]
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
