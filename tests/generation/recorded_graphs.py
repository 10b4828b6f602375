"""The plain and the fast path of a call, side by side.

On a GPU the graphs are captured. Elsewhere a "graph" records torch's operations with their tensors, and repeats them on
these tensors, so that whatever a graph must not rely on shows: buffers that move, numbers that have changed, a look at
what was computed.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..builders import MASK, left_pad, new_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, MASK, 22, 23]]
LOOKS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "bincount")


class Recorder(TorchDispatchMode):
    """Operations with their arguments and results. What a capture on a GPU would refuse is refused.

    operations: `(function, positional arguments, keyword arguments, the tensors of its result, whether it is a collective)`.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_look, writes, is_collective = traits(function)
        if is_look:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **kwargs)
        if is_collective:
            wait_for(result)
        if writes or is_collective or not (memory(result) <= memory((args, kwargs))):  # a view needs no repetition
            tensors = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
            self.operations.append((function, args, kwargs, tensors, is_collective))
        return result


@cache
def traits(function) -> tuple[bool, bool, bool]:
    """Whether an operation looks at what was computed, writes to an argument, is a collective."""
    name = str(function)
    writes = any(value.alias_info is not None and value.alias_info.is_write for value in function._schema.arguments)
    return any(look in name for look in LOOKS), writes, function.namespace == "c10d"


def leaves(tree) -> Iterator:
    """What is in nested lists, tuples and dictionaries: torch's own `tree_leaves` would take most of the time."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        yield tree
        return
    for each in tree:
        yield from leaves(each)


def wait_for(tree) -> None:
    """Wait for collectives among what operations return."""
    for leaf in leaves(tree):
        if isinstance(leaf, torch.ScriptObject):
            leaf.wait()


def memory(tree) -> set[int]:
    """Where the tensors in something nested begin to be stored."""
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)}


class Recorded:
    """What stands for a graph on a CPU."""

    def __init__(self, run, pool, stream):
        with Recorder() as recorder:
            run()
        self.operations, self.has_run = recorder.operations, True

    def replay(self):
        if self.has_run:  # unlike a capture, recording has computed
            self.has_run = False
            return
        for function, args, kwargs, results, is_collective in self.operations:
            repeated = function(*args, **kwargs)
            if is_collective:
                wait_for(repeated)
            tensors = [repeated] if isinstance(repeated, torch.Tensor) else leaves(repeated)
            for old, new in zip(results, (each for each in tensors if isinstance(each, torch.Tensor))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def fresh_model(family: str, **changes):
    return new_model(family, **changes).to(DEVICE)


def both_ways(model, rows=ROWS, seeds=0, **options):
    """The output of the plain path, which is returned, and of two calls on the fast path, which must be the same."""
    inputs = {name: tensor.to(DEVICE) for name, tensor in left_pad(rows).items()}
    options["return_dict_in_generate"] = options.get("return_dict_in_generate", True)

    def call(**more):
        if isinstance(seeds, list):
            generator = [torch.Generator(DEVICE).manual_seed(seed) for seed in seeds]
        else:
            generator = torch.Generator(DEVICE).manual_seed(seeds)
        return model.diffusion_generate(**inputs, generator=generator, **options, **more)

    plain = call(disable_compile=True)
    for _ in range(2):
        fast = call()
        assert fast.sequences.tolist() == plain.sequences.tolist()
        assert fast.tokens_per_forward.tolist() == plain.tokens_per_forward.tolist()
        assert fast.num_forward_passes == plain.num_forward_passes
    return plain
