"""The plain and the fast path of a call, side by side.

On a GPU the graphs are captured. Elsewhere a "graph" records torch's operations with their tensors, and repeats them on
these tensors, so that whatever a graph must not rely on shows: buffers that move, numbers that have changed, a look at
what was computed.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..builders import MASK, left_pad, new_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, MASK, 22, 23]]


class Recorder(TorchDispatchMode):
    """Operations with their arguments and results. What a capture on a GPU would refuse is refused."""

    LOOKS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "bincount")

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.LOOKS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **(kwargs or {}))
        writes = any(value.alias_info is not None and value.alias_info.is_write for value in function._schema.arguments)
        is_collective = function.namespace == "c10d"
        wait_for(result)
        if writes or is_collective or not (memory(result) <= memory((args, kwargs))):  # a view needs no repetition
            self.operations.append((function, args, kwargs or {}, result))
        return result


def wait_for(tree) -> None:
    """Wait for collectives among what operations return."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.ScriptObject):
            leaf.wait()


def memory(tree) -> set[int]:
    """Where the tensors in something nested begin to be stored."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


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
        for function, args, kwargs, results in self.operations:
            repeated = function(*args, **kwargs)
            wait_for(repeated)
            for old, new in zip(tree_leaves(results), tree_leaves(repeated)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
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
