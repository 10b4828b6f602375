"""Matrix products of the same input, as one."""

import threading
import weakref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

# Joining moves parameters: one thread at a time, and none while another captures a graph.
lock = threading.RLock()


class JointProducts:
    """Products of the same input, as one: three small ones leave a third of the memory's speed unused.

    Their weights are put side by side, and the parameters of the modules become parts of that memory, each with a
    storage of its own: nothing is stored twice, and whoever trains, saves or moves the modules finds what they always
    held. Where that cannot be (other modules than plain `nn.Linear`, no room for the second copy that exists for a
    moment, gradients, memory that others have as well) the modules run one by one.
    """

    def __init__(self, linears: list[nn.Module], is_shared: bool = False):
        """`is_shared`: some of the parameters belong to other products too."""
        self.linears = linears
        self.joint: list[torch.Tensor | None] = [None]
        plain = all(type(linear) is nn.Linear and "forward" not in vars(linear) for linear in linears)
        if plain and not is_shared and len({linear.bias is None for linear in linears}) == 1:
            self.sizes = [len(linear.weight) for linear in linears]
            names = ["weight"] if linears[0].bias is None else ["weight", "bias"]
            with lock:  # not beside another thread that does the same, or that captures
                self.joint = [_side_by_side(linears, name) for name in names]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if any(each is None for each in self.joint):
            return tuple(linear(x) for linear in self.linears)
        return nn.functional.linear(x, *self.joint).split(self.sizes, dim=-1)


# Of the first module of each group, the memory in which its parameters and those of its neighbours stand, not held.
_joined: "weakref.WeakKeyDictionary[nn.Module, dict[str, StorageWeakRef]]" = weakref.WeakKeyDictionary()


def _side_by_side(linears: list[nn.Linear], name: str) -> torch.Tensor | None:
    """One tensor whose parts are the parameters of this name; they are made so if they can be."""
    parameters = [getattr(linear, name) for linear in linears]
    first = parameters[0]
    if any(type(each) is not nn.Parameter or not each.is_contiguous() for each in parameters):
        return None
    if len({(each.dtype, each.device, each.shape[1:]) for each in parameters}) > 1:
        return None
    if any(each.is_inference() for each in parameters):
        return None
    if not first.is_floating_point() or len({each.data_ptr() for each in parameters}) < len(parameters):
        return None
    sizes = [each.shape[0] for each in parameters]
    shape = (sum(sizes), *first.shape[1:])

    reference = _joined.get(linears[0], {}).get(name)
    storage = None if reference is None else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    if storage is not None and (storage.nbytes(), storage.data_ptr()) == (_bytes(parameters), first.data_ptr()):
        joint = torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, shape)
        if [part.data_ptr() for part in joint.split(sizes)] == [each.data_ptr() for each in parameters]:
            return joint

    if any(each.grad is not None or not _is_alone(each) for each in parameters):
        return None
    if first.is_cuda and torch.cuda.mem_get_info(first.device)[0] < 2 * _bytes(parameters):
        return None
    with torch.inference_mode(False), torch.no_grad():
        try:
            joint = torch.cat([each.data for each in parameters])
        except torch.OutOfMemoryError:
            return None
        for each, part in zip(parameters, joint.split(sizes), strict=True):
            # Not a view: those who save weights take one storage for one tensor, and would leave out the others.
            each.data = torch.from_dlpack(part)
    _joined.setdefault(linears[0], {})[name] = StorageWeakRef(joint.untyped_storage())
    if first.is_cuda:
        torch.cuda.empty_cache()  # else the holes that they leave, which fit nothing, add up to half of the model
    return joint


def _is_alone(parameter: nn.Parameter) -> bool:
    """Whether it is all of its storage, and nothing else has this storage: another model, a `state_dict()`."""
    storage = parameter.untyped_storage()
    return storage.nbytes() == parameter.nbytes and torch._C._storage_Use_Count(storage._cdata) <= 2


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(each.nbytes for each in parameters)
