"""Two processes that compute together, as those that `torchrun` starts."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context

import torch
from torch import distributed

PATIENCE = 900  # seconds


def in_two_processes(function: Callable, *arguments) -> None:
    """`function(*arguments)` in each of two processes on the CPU.

    They are forked from one that has imported the function's module: two imports would take longer than most functions.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_run, args=(rank, port, function, arguments)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def _run(rank: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    function(*arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()
