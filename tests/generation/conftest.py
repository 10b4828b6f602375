"""The fast path, on machines without a GPU too."""

import pytest

from dllm_hf.generation import graphs, mixin

from .recorded_graphs import DEVICE, Recorded


@pytest.fixture
def captured(monkeypatch):
    """Turns the fast path on, and yields a list that receives each graph."""
    found, capture = [], graphs.capture if DEVICE == "cuda" else Recorded

    def noted(*args):
        found.append(capture(*args))
        return found[-1]

    monkeypatch.setattr(mixin, "are_possible", lambda device: True)
    monkeypatch.setattr(graphs, "capture", noted)
    yield found
