"""Which tests are run, in which order. Fixtures that several test modules share are in `fixtures.py`."""

import atexit
import gc
import os
import zlib

# Read when Triton is first imported, which may be by any of the packages below. A GPU compiles the kernels instead.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

gc.disable()  # while tests are collected: it finds no garbage in what they import, and takes longer with each module

# The files that take longest, first: a worker that begins with one near the end would leave the other idle.
LONGEST = ["runtimes/test_executorch", "runtimes/test_executorch_cpp", "contracts/test_batches", "hub/test_export"]
LONGEST += [
    "training/test_trainer",
    "contracts/test_turns",
    "generation/test_graphs_between_calls",
    "examples/test_train",
]
LONGEST += ["contracts/test_block_policy", "kernels/test_kernels", "toolbox/test_export", "kernels/test_gla_dream"]
LONGEST += [
    "generation/test_graphs",
    "cli/test_process",
    "engine/test_alone",
    "generation/test_decoder",
    "hub/test_push",
]
LONGEST += ["toolbox/test_compile", "benchmarks/test_decoding_quality", "parallel/test_tensor_parallel"]


def pytest_configure(config):
    """The process that starts xdist's workers runs no test: without the fixtures, they begin as soon as it does."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_ignore_collect(collection_path, config):
    """Where slow tests are left out, so are files of nothing else: the runtimes that they import take seconds to load."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return b"\npytestmark = pytest.mark.slow" in collection_path.read_bytes() or None
    return None


def pytest_collection_modifyitems(config, items):
    import torch

    items[:], left_out = sampled(items)
    config.hook.pytest_deselected(items=left_out)
    order = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Training and `torch.export` collect garbage at each call, which would look at a million objects of the modules."""
    gc.freeze()
    gc.enable()


@atexit.register  # no earlier: pytest collects garbage at its end, five times
def unfreeze():
    gc.unfreeze()  # else nanobind, of which Triton is built, takes for leaks what lives at the end


def names(value: str, family: str) -> bool:
    """Whether a parameter of a test, or one that is part of it, is a family."""
    return value == family or f"'{family}'" in value


def sampled(items: list) -> tuple[list, list]:
    """The tests to run and those to leave out: each promise is tried on one of the families in `SAMPLED`, once. `contracts/`
    chooses by itself."""
    from .builders import SAMPLED, is_sampled

    of, found = {}, {}
    for item in items:
        if "/contracts/" in item.nodeid:
            continue
        values = [str(value) for value in item.callspec.params.values()] if hasattr(item, "callspec") else []
        families = (name for name in filter(is_sampled, SAMPLED) for value in values if names(value, name))
        if (family := next(families, None)) is not None:
            promise = of[item] = item.nodeid.partition("[")[0]
            found.setdefault(promise, {}).setdefault(family, item)
    chosen = set()
    for promise, tests in found.items():
        turn = sorted(tests)[zlib.crc32(promise.encode()) % len(tests)]
        chosen.add(tests[turn])
    kept = [item for item in items if item not in of or item in chosen]
    return kept, [item for item in items if item in of and item not in chosen]
