"""Processes of an engine have their environment before they import anything."""

import os

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
