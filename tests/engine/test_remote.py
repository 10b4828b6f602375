"""Processes of an engine: their environment, and what the garbage collector does in them."""

import gc
import os
from collections import deque
from types import SimpleNamespace

from dllm_hf.engine.heart import freeze_objects
from dllm_hf.engine.outputs import Load
from dllm_hf.engine.remote import CONTEXT, start
from dllm_hf.engine.replicas import Replicas
from dllm_hf.engine.workers import Workers

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
    try:
        freeze_objects()
        assert gc.get_freeze_count() > 10_000 > len(gc.get_objects())
        cycle = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1  # what comes later is collected
    finally:
        gc.unfreeze()


def test_what_waits_is_counted_while_a_step_in_another_thread_changes_it():
    """Whoever submits a request counts, and no thread waits for a step for that."""
    group, replicas = Workers.__new__(Workers), Replicas.__new__(Replicas)
    group._load, group._submitted, group._exchanges = Load(0, 1, 0.0, 0), 2, deque()
    replicas._slots, outstanding = 1, {}
    replicas._replicas = [SimpleNamespace(outstanding=outstanding)]

    class Exchange:
        @property
        def submitted(self) -> int:
            group._exchanges.append(SimpleNamespace(submitted=0))
            return 3

    class Request(dict):
        def __len__(self) -> int:
            outstanding.pop("b", None)
            return 5

    group._exchanges.append(Exchange())
    outstanding.update(a=Request(), b={0: None})
    assert group.num_waiting == 6 and replicas.num_waiting == 5
