"""The common model tests of transformers, out of its unpacked source distribution.

Like this one, their package is called `tests`; here it is `transformers_tests`.
"""

import importlib
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

PACKAGE = "transformers_tests"
TESTS = Path(os.environ["TRANSFORMERS_SOURCE"]).resolve() / "tests"


def _be_rank(rank: int, world_size: int, port: int, function: Callable, args: tuple) -> None:
    address = f"tcp://localhost:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    function(rank, *args)
    torch.distributed.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """Of a function, one that runs it in several processes, with the rank as first argument."""

    def run(function, *args):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_be_rank, (world_size, port, function, args), nprocs=world_size)

    return lambda function: partial(run, function)


# A source distribution has of this package only `tests/test_*.py`. These are the other files that those import, and
# the names: of the mixins of tests nothing is left, the rest are values of our own.
LEFT_OUT = {
    "distributed_testing_utils": {"run_distributed": run_distributed},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "label"},
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}


def _add_module(name: str, folder: Path | None = None, **values) -> None:
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = [str(folder)] if folder else []
    vars(module).update(values)


def _import(file: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{file}")


_add_module(PACKAGE, TESTS)
for _file, _values in LEFT_OUT.items():
    _folder, _, _ = _file.rpartition(".")
    if _folder:
        _add_module(f"{PACKAGE}.{_folder}")
    _add_module(f"{PACKAGE}.{_file}", **_values)

# For a module that nothing reads it looks for `tests/__init__.py`, which is left out as well.
with patch("transformers.utils.direct_transformers_import"):
    ConfigTester = _import("test_configuration_common").ConfigTester
ModelTesterMixin = _import("test_modeling_common").ModelTesterMixin
TensorParallelTesterMixin = _import("test_tensor_parallel_mixin").TensorParallelTesterMixin
_import("test_tensor_parallel_mixin").TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # the models to test: all
ids_tensor = _import("test_modeling_common").ids_tensor
