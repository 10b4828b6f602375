"""Kernels compiled before they are launched, several at a time."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from .triton import triton

_lock = threading.Lock()


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Kernels that this thread launches inside are compiled, on several threads, and not launched: the results hold anything.
    At the end all are compiled. Triton's compiler works outside of Python's lock for the most part."""
    function, own = triton.runtime.jit.JITFunction, threading.get_ident()
    with _lock:
        run = function.run

        def compile_instead(kernel, *args, grid, warmup, **options):
            return run(kernel, *args, grid=grid, warmup=warmup or threading.get_ident() == own, **options)

        function.run = compile_instead  # launches of other threads pass through
        try:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads, triton.AsyncCompileMode(threads):
                yield
        finally:
            function.run = run
