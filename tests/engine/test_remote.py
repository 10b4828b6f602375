"""Processes of an engine: their environment, and what the garbage collector does in them."""

import gc
import os

from dllm_hf.engine.heart import freeze_objects
from dllm_hf.engine.remote import CONTEXT, start

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
