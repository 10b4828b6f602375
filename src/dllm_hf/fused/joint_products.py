"""Several linear layers of the same input as one matrix product."""

import threading
import weakref
from collections.abc import Collection

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..generation.ranks import local

# Held to join weights, which moves parameters, and to capture a graph, which must not see them move.
lock = threading.RLock()


class JointProducts:
    """Linear layers of the same input as one product: three small products leave a third of the memory bandwidth unused.

    The weights are copied into one joint tensor, and the modules' parameters become parts of its memory, each with a storage
    of its own: nothing is stored twice, and training, saving and moving the modules work as before. The modules run one by
    one where the weights cannot be joined: modules other than plain `nn.Linear`, no memory for the temporary second copy,
    gradients, storages that something else shares.
    """

    takes_float8 = False  # see [`QuantizedProducts`]

    def __init__(self, linears: list[nn.Module], is_shared: bool = False, divided: Collection[nn.Module] = ()):
        """`is_shared`: whether another joint product has some of the parameters too; `divided`: the modules whose outputs are
        divided between processes: this one computes its part."""
        self.linears, self.joint = linears, list[torch.Tensor]()
        plain = [
            each for each in linears if type(each) is nn.Linear and (each in divided or "forward" not in vars(each))
        ]
        is_plain = len(plain) == len(linears) and all(linear.weight.is_floating_point() for linear in plain)
        if is_plain and not is_shared and len({linear.bias is None for linear in plain}) == 1:
            self.sizes = [len(local(linear.weight)) for linear in plain]
            names = ["weight"] if plain[0].bias is None else ["weight", "bias"]
            with lock:
                joint = [side_by_side([getattr(each, name) for each in plain], plain[0], name) for name in names]
            parts = [each for each in joint if each is not None]
            self.joint = parts if len(parts) == len(names) else []

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.joint:
            return tuple(linear(x) for linear in self.linears)
        return nn.functional.linear(x, *self.joint).split(self.sizes, dim=-1)


# Weak references to the joint storages by name, keyed by the group's first module.
_joined: "weakref.WeakKeyDictionary[nn.Module, dict[str, StorageWeakRef]]" = weakref.WeakKeyDictionary()


def side_by_side(tensors: list[torch.Tensor], owner: nn.Module, name: str) -> torch.Tensor | None:
    """The joint tensor of `tensors`, which become its parts; None where they cannot be joined.

    Args:
        tensors: parameters, or what quantised ones consist of.
        owner: the module of the first, and `name`, what it is there.
    """
    parameters = [local(each) for each in tensors]
    first = parameters[0]
    if any(type(each) not in (nn.Parameter, torch.Tensor) for each in parameters):
        return None
    if len(parameters) == 1:
        return first.data
    if any(not each.is_contiguous() or each.is_inference() for each in parameters):
        return None
    if len({(each.dtype, each.device, each.shape[1:]) for each in parameters}) > 1:
        return None
    if len({each.data_ptr() for each in parameters}) < len(parameters):
        return None
    sizes = [each.shape[0] for each in parameters]
    shape = (sum(sizes), *first.shape[1:])

    reference = _joined.get(owner, {}).get(name)
    storage = None if reference is None else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    if storage is not None and (storage.nbytes(), storage.data_ptr()) == (_bytes(parameters), first.data_ptr()):
        joint = torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, shape, first.stride())
        if [part.data_ptr() for part in joint.split(sizes)] == [each.data_ptr() for each in parameters]:
            return joint

    if any(each.grad is not None for each in tensors) or not all(map(_is_alone, parameters)):
        return None
    if first.is_cuda and torch.cuda.mem_get_info(first.device)[0] < 2 * _bytes(parameters):
        return None
    with torch.inference_mode(False), torch.no_grad():
        try:
            joint = torch.cat([each.data for each in parameters])
        except torch.OutOfMemoryError:
            return None
        for each, part in zip(parameters, joint.split(sizes), strict=True):
            # Not a view: code that saves weights takes parameters that share a storage for one tensor. As bytes, since not
            # every version of PyTorch passes numbers of 8 bits on.
            each.data = torch.from_dlpack(part.view(torch.uint8)).view(part.dtype)
    _joined.setdefault(owner, {})[name] = StorageWeakRef(joint.untyped_storage())
    if first.is_cuda:
        torch.cuda.empty_cache()  # the freed originals fragment the allocator's cache, by up to half of the model's size
    return joint


def _is_alone(parameter: torch.Tensor) -> bool:
    """Whether nothing else shares a parameter's storage: another model, a `state_dict()`. It need not fill it: the part of a
    weight that a process has loaded may be a view of the whole one, which is freed then."""
    return _holders(parameter) <= _holders(torch.empty(1))


def _holders(tensor: torch.Tensor) -> int:
    """Of its storage, of which newer versions of PyTorch count the object in Python too."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _bytes(parameters: list[torch.Tensor]) -> int:
    return sum(each.nbytes for each in parameters)
