"""What a process tells of itself while it is at work."""

import threading
import time
import weakref

import pytest
import torch

from dllm_hf.engine import heart
from dllm_hf.engine.heart import Beat, Heart


class Pipe:
    """Keeps what is sent. `is_told`: set by that."""

    def __init__(self):
        self.told, self.is_told = list[Beat](), threading.Event()

    def send(self, message: Beat) -> None:
        self.told.append(message)
        self.is_told.set()


@pytest.fixture
def new_heart(monkeypatch):
    """A heart that beats ten times a second, with its pipe."""
    monkeypatch.setattr(heart, "BEAT_SECONDS", 0.1)
    hearts = []

    def make(device: str) -> tuple[Heart, Pipe]:
        pipe = Pipe()
        hearts.append(Heart(pipe, torch.device(device)))
        hearts[-1].start()
        return hearts[-1], pipe

    yield make
    for each in hearts:
        each._stopped.set()
        each.join()


def compute(seconds: float) -> None:
    """At one instruction, as attention is to a long prompt in every layer."""
    end, matrix = time.monotonic() + seconds, torch.ones(500, 500)
    while time.monotonic() < end:
        torch.mm(matrix, matrix)


@pytest.mark.parametrize(
    "device, work, moves",
    [("cpu", compute, True), ("cpu", time.sleep, False), ("cuda", compute, False), ("meta", time.sleep, True)],
)
def test_on_a_cpu_who_computes_moves_and_who_hears_others_does(new_heart, device, work, moves):
    """A GPU that hangs may be waited for by a process that computes as well."""
    beating, pipe = new_heart(device)
    with beating.at_work():
        work(0.9)
    longest = max(beat.stuck for beat in pipe.told)
    assert longest < 0.35 if moves else longest > 0.45


def test_a_look_keeps_no_tensor_of_a_step_that_goes_on(new_heart):
    beating, pipe = new_heart("cpu")

    def layer() -> weakref.ref:
        activations = torch.ones(10)
        pipe.is_told.wait()
        return weakref.ref(activations)

    with beating.at_work():
        assert layer()() is None
