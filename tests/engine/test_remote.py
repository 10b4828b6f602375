"""Processes of an engine: their environment, and what the garbage collector does in them."""

import gc
import os
import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest

from dllm_hf.engine import replicas, workers
from dllm_hf.engine.heart import Beat, frozen_objects
from dllm_hf.engine.outputs import Load
from dllm_hf.engine.remote import CONTEXT, start
from dllm_hf.engine.replica import Replica
from dllm_hf.engine.replicas import Replicas
from dllm_hf.engine.worker import Stepped
from dllm_hf.engine.workers import Exchange, Workers

from .environment import tell


def test_a_process_sees_its_gpus_from_its_first_import_on():
    before = dict(os.environ)
    connection, inner = CONTEXT.Pipe()
    process = CONTEXT.Process(target=tell, args=(inner,))
    start(process, {"CUDA_VISIBLE_DEVICES": "5,6"})
    assert connection.recv() == "5,6"
    process.join()
    assert dict(os.environ) == before


def test_a_collection_does_not_look_through_what_was_there_before_the_first_step():
    """Of some four hundred thousand objects of libraries, for a quarter of a second."""
    with frozen_objects():
        assert gc.get_freeze_count() > 10_000 > len(gc.get_objects())
        cycle = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1  # what comes later is collected
    assert not gc.get_freeze_count()


def test_what_waits_is_counted_while_a_step_in_another_thread_changes_it():
    """Whoever submits a request counts, and no thread waits for a step for that."""
    group, several = Workers.__new__(Workers), Replicas.__new__(Replicas)
    group._load, group._submitted, group._exchanges = Load(0, 1, 0.0, 0), 2, deque()
    several._slots, outstanding = 1, {}
    several._replicas = [SimpleNamespace(outstanding=outstanding)]

    class InFlight:
        @property
        def submitted(self) -> int:
            group._exchanges.append(SimpleNamespace(submitted=0))
            return 3

    class Request(dict):
        def __len__(self) -> int:
            outstanding.pop("b", None)
            return 5

    group._exchanges.append(InFlight())
    outstanding.update(a=Request(), b={0: None})
    assert group.num_waiting == 6 and several.num_waiting == 5


@pytest.fixture
def answers_late(monkeypatch):
    """A pipe, from whose other end a message comes half a second after this process has stood still for a minute."""
    clock = iter([0.0])
    for module in (replicas, workers):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock, 60.0)))

    def answer(message) -> workers.Connection:
        connection, other = CONTEXT.Pipe()
        threading.Timer(0.5, other.send, [message]).start()
        return connection

    return answer


def test_a_process_is_not_taken_for_dead_when_this_one_has_stood_still(answers_late):
    """As by Ctrl-Z, or another thread that does not let go of the interpreter."""
    process = SimpleNamespace(pid=1, kill=lambda: pytest.fail("It was killed."))
    requests = SimpleNamespace(closed=False)
    replica = Replica(0, process, requests, answers_late(Beat(0.0)), outstanding={"a": {}}, heard=-60.0)
    several = Replicas.__new__(Replicas)
    several._replicas, several._told = [replica], []
    assert several.step() == several.step() == [] and replica.heard == 60


def test_several_that_do_not_answer_are_waited_for_together():
    process = SimpleNamespace(pid=1, kill=int, join=lambda timeout: None)
    pipes = [(CONTEXT.Pipe(), CONTEXT.Pipe()) for _ in range(4)]
    several = Replicas.__new__(Replicas)
    several._told, several._replicas = (
        [],
        [
            Replica(index, process, requests[0], events[0], outstanding={"a": {}}, heard=time.monotonic() - 60)
            for index, (requests, events) in enumerate(pipes)
        ],
    )
    begun = time.monotonic()
    assert several.step() == [] and time.monotonic() - begun < 2 * replicas.BEAT_SECONDS
    assert not any(each.is_alive for each in several._replicas)


def test_nor_is_one_of_a_group(answers_late):
    group, reply = Workers.__new__(Workers), Stepped([], Load(0, 0, 0.0, 0), (), None)
    group._size, group._processes = 1, [SimpleNamespace(pid=1)]
    group._connections, group._exchanges = [answers_late(reply)], deque([Exchange(None, 0)])
    group._hear(group._exchanges[0].replies)
    assert group._exchanges[0].replies == {0: reply}
