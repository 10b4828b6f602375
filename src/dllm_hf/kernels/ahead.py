"""Kernels made ready before they are launched, several at a time."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .triton import triton

_lock, _counting = threading.Lock(), threading.Lock()
# One for each use of `without_collection` that goes on: whether the first has found it on.
_uncollected: list[bool] = []


@contextmanager
def without_collection() -> Iterator[None]:
    """Python collects no garbage while any thread is inside."""
    with _counting:
        _uncollected.append(_uncollected[0] if _uncollected else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _counting:
            if _uncollected.pop() and not _uncollected:
                gc.enable()


class _Builders(ThreadPoolExecutor):
    """Threads that compile kernels and make them ready to launch."""

    def submit(self, compiled: Callable[[], Any]) -> Future:  # type: ignore[override]  # all that Triton hands over
        def build() -> Any:
            kernel = compiled()
            # Loads it onto the device, and makes the function that launches it, for which Triton 3.6 takes a C compiler.
            kernel.run  # noqa: B018
            return kernel

        return super().submit(build)


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Kernels that this thread launches inside are made ready on several threads, for the current device, and not launched: the
    results hold anything. At the end all are. Triton's compiler works outside of Python's lock for the most part."""
    function, own = triton.runtime.jit.JITFunction, threading.get_ident()
    device = torch.cuda.current_device()  # of this thread: others begin with the first
    # The compiler's many objects would set off a collection, which holds all threads up for a third of a second, and in Python
    # 3.11, if it switches threads, lets `ast` fail in others (https://github.com/python/cpython/issues/106905).
    with _lock, without_collection():
        run = function.run

        def compile_instead(kernel, *args, grid, warmup, **options):
            return run(kernel, *args, grid=grid, warmup=warmup or threading.get_ident() == own, **options)

        function.run = compile_instead  # launches of other threads pass through
        try:
            threads = _Builders(min(16, os.cpu_count() or 1), initializer=torch.cuda.set_device, initargs=(device,))
            with threads, triton.AsyncCompileMode(threads):
                yield
        finally:
            function.run = run


@contextmanager
def compiler_prepared() -> Iterator[None]:
    """On other threads, beside what runs inside, what comes before the first kernel of a process: Triton compiles a part of its
    driver, once on a machine, and hashes the compiler, hundreds of megabytes, by which its cache knows it."""
    with ThreadPoolExecutor(2) as threads:
        begun = [threads.submit(lambda: triton.runtime.driver.active), threads.submit(triton.runtime.cache.triton_key)]
        yield
    for each in begun:
        each.result()
