"""Signs of life: how a process that other processes wait for tells that it is there, and whether it moves."""

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import CodeType

import torch

BEAT_SECONDS = 1.0
# A process that says nothing for so long while it is at work is taken for dead, and so is one that stands at one instruction.
HANG_SECONDS = 7.0
COMPILER = os.path.join("triton", "compiler", "compiler.py")
# Part of a core that a process takes at least which computes; its other threads take less while they wait for messages.
COMPUTING = 0.1


@dataclass(frozen=True)
class Beat:
    """Tells, in the middle of a step, that a process is there. stuck: seconds for which it has stood at one instruction."""

    stuck: float


@contextmanager
def frozen_objects() -> Iterator[None]:
    """For a process that decodes and does nothing else, once its engine is there: the garbage collector does not look through
    the objects of all libraries again, for which a step would wait a quarter of a second every now and then."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # what nobody collects at the end nanobind, of which Triton is built, takes for leaks


class Heart(threading.Thread):
    """Sends beats while the process is at work. It moves from one piece of work to the next, at whose same instruction it waits
    for the GPU, and within one as long as one of its threads does: those that compile side by side keep the main one waiting. So
    does Triton's compiler, which stands for seconds where many processes share few cores. Daemons, which wait for messages, do
    not count. On CPUs, where most of a long step may be at one instruction, which is that of every layer, it moves as long as it
    computes.

    Args:
        device: of the model; `meta` where other processes hold it. This one hears their hearts then, and moves in any case.
    """

    def __init__(self, connection: Connection, device: torch.device):
        super().__init__(daemon=True)
        self.connection, self.lock, self.is_working = connection, threading.Lock(), False
        self._device, self._pieces = device.type, 0
        self._stopped = threading.Event()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around a piece of work, a step for example."""
        self._pieces, self.is_working = self._pieces + 1, True
        try:
            yield
        finally:
            self.is_working = False

    def run(self) -> None:
        last, stuck, computed = None, 0.0, 0.0
        while not self._stopped.wait(BEAT_SECONDS):
            place, before, computed = (self._pieces, _places()), computed, time.process_time()
            compiles = any(code.co_filename.endswith(COMPILER) for stack in place[1] for code, _ in stack)
            computes = self._device == "cpu" and computed - before > COMPUTING * BEAT_SECONDS
            moves = place != last or compiles or computes or self._device == "meta"
            stuck = stuck + BEAT_SECONDS if self.is_working and not moves else 0.0
            last = place
            if self.is_working:
                self.send(Beat(stuck))

    def send(self, message: object) -> None:
        try:
            with self.lock:
                self.connection.send(message)
        except OSError:  # the parent has gone, and a collective that waits for another process cannot be left otherwise
            os._exit(1)


def _places() -> list[list[tuple[CodeType, int]]]:
    """Where each thread stands that is no daemon: all calls of its stack, since the last frame may be another one at the same
    place in memory, and at the same instruction. No frame is kept: its tensors would stay in memory until the next look."""
    own = {each.ident for each in threading.enumerate() if not each.daemon}
    return [
        [(each.f_code, each.f_lasti) for each, _ in traceback.walk_stack(frame)]
        for ident, frame in sys._current_frames().items()
        if ident in own
    ]
