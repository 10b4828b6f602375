"""`Ranks`: the processes that the weights of a model are divided between (tensor parallelism, arXiv:1909.08053)."""

import hashlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import distributed, nn
from transformers import StoppingCriteria


class Ranks:
    """The processes of a group, each of which computes a part of every forward pass. They run the same program on the same
    arguments, and nothing that they decide by may differ between them.

    Args:
        group: of `torch.distributed`.

    Attributes:
        rank, size: the index of this process in the group, and their number.
    """

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, distributed.get_rank(group), distributed.get_world_size(group)
        self.first = distributed.get_global_rank(group, 0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all processes. `x`, contiguous, may hold it afterwards."""
        distributed.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`(size, *x.shape)`, what each process has; the shapes must be equal."""
        gathered = x.new_empty(self.size * x.numel())
        distributed.all_gather_into_tensor(gathered, x.flatten(), group=self.group)
        return gathered.view(self.size, *x.shape)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the processes have."""
        return int(self.all_gather(torch.tensor([number], device=device)).min())

    def agree(self, model: Any, prompts: list, options: dict, generators: Iterable[torch.Generator | None]) -> None:
        """Before a call: refuse what cannot be divided, and calls that differ; draw alike."""
        self.check_heads(model)
        self.check_same(model.device, prompts, options)
        self.share_draws(generators, model.device)

    def check_heads(self, model: Any) -> None:
        """Raises a `ValueError` where a plan of the library cuts heads of keys and values into pieces."""
        kv_heads = getattr(model.config, "num_key_value_heads", self.size)
        if kv_heads % self.size and divides_heads(model.tp_plan):
            raise ValueError(
                f"The model's {kv_heads} heads of keys and values cannot be divided between {self.size} processes: start fewer, or "
                "use `LLM(tensor_parallel_size=...)`, which repeats heads."
            )

    def check_same(self, device: torch.device, *values: object) -> None:
        """Raises a `ValueError` in every process where the values, which must have a `repr`, differ between them: the processes
        would wait for each other forever."""
        digest = hashlib.sha256(repr(values).encode()).digest()[:8]
        every = self.all_gather(torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device))
        if len(set(every.flatten().tolist())) > 1:
            raise ValueError(
                f"The model is divided between {self.size} processes, and their calls differ: every process must call "
                "`diffusion_generate` with the same prompts and options."
            )

    def share_draws(self, generators: Iterable[torch.Generator | None], device: torch.device) -> None:
        """Make generators draw in every process what they draw in the first. None is PyTorch's own of a device."""
        for generator in dict.fromkeys(generators):
            on_gpu = device.type == "cuda"
            if generator is not None:
                state = generator.get_state()
            else:
                state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
            state = state.to(device)
            distributed.broadcast(state, self.first, group=self.group)
            if generator is not None:
                generator.set_state(state.cpu())
            elif on_gpu:
                torch.cuda.set_rng_state(state.cpu(), device)
            else:
                torch.set_rng_state(state)

    def first_says(self, answer: bool, device: torch.device) -> bool:
        """The answer of the first process."""
        said = torch.tensor([answer], dtype=torch.uint8, device=device)
        distributed.broadcast(said, self.first, group=self.group)
        return bool(said)


class SharedCriterion(StoppingCriteria):
    """A criterion that holds where it holds in the first process: what it depends on, such as the time, may differ."""

    def __init__(self, criterion: Callable, ranks: Ranks):
        self.criterion, self.ranks = criterion, ranks

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        # The loop asks about one row.
        holds = bool(torch.as_tensor(self.criterion(input_ids, scores, **kwargs)).all())
        return torch.tensor([self.ranks.first_says(holds, input_ids.device)], device=input_ids.device)


def local(parameter: Any) -> torch.Tensor:
    """What this process holds of a parameter."""
    return getattr(parameter, "_local_tensor", parameter)


def ranks_of(model: Any) -> Ranks | None:
    """The processes that `from_pretrained(..., tp_plan=...)` has divided a model between; None where it is whole."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return Ranks(mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group())


def divides_heads(plan: Collection[str]) -> bool:
    """Whether a `tp_plan` divides the heads of attention, and not the feed-forward networks alone."""
    return any(name.endswith(".k_proj") for name in plan)


def divided_modules(model: Any) -> set[nn.Module]:
    """The modules that the library has given a part in tensor parallelism, and with it a forward pass of its own."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return set()
    generic = lambda name: ".".join("*" if part.isdigit() else part for part in name.split("."))
    return {module for name, module in model.named_modules() if generic(name) in model.tp_plan}
