"""`SharedSums`: sums over GPUs that read and write each other's memory. They take less time than an all-reduce of NCCL, and the
norm that follows is a part of them."""

import socket
import zlib

import torch
from torch import nn

from ..generation.ranks import Ranks
from ..kernels.reduce import divide_add_rms_norm, push_add_rms_norm

try:
    from torch.distributed import _symmetric_memory as symmetric_memory
except ImportError:  # a build of PyTorch without distributed
    symmetric_memory = None  # type: ignore[assignment]

# By the number of GPUs, the bytes that one receives for a sum up to which all send their whole parts. To divide the tokens takes
# a second meeting, about 4 us, in which NVLink moves 1.5 MB; it saves nothing of the way on two GPUs, half of it on four and three
# quarters on eight, and of the norms all but a GPU's share.
PUSHED = {2: 8 * 2**20, 4: 3 * 2**20, 8: 2 * 2**20}


class SharedSums:
    """Buffers of each GPU that all can write, and flags. Sums of few tokens use buffers in turn: who begins the second sum knows
    that all have read the first. The first sum of a forward pass has a buffer of its own: a graph does not know which one the
    pass before has used last.

    Args:
        ranks: see [`SharedSums.of`].

    Attributes:
        max_bytes: of a tensor to be summed. Larger ones are left to NCCL.
    """

    max_bytes = 32 * 2**20

    def __init__(self, ranks: Ranks, dtype: torch.dtype, device: torch.device, size: int):
        self.ranks, self.turn = ranks, -1
        self.pushed, self.tokens = self.limits(size * dtype.itemsize, ranks.size)
        new = lambda *shape, dtype=dtype: symmetric_memory.empty(*shape, dtype=dtype, device=device)
        self.room = max(self.pushed, 16)  # memory of no bytes cannot be shared
        own = new(3, ranks.size, self.room, size).fill_(-0.0), new(3, self.tokens, size)
        flags = new(2, -(-self.tokens // ranks.size), ranks.size, dtype=torch.int32).zero_()
        handles = [symmetric_memory.rendezvous(each, ranks.group) for each in (*own, flags)]
        self._held = own, flags, handles
        # The addresses of the parts of an array on all GPUs.
        inboxes, divided, self.flags = (
            torch.tensor([[base + part.data_ptr() - each.data_ptr() for base in handle.buffer_ptrs] for part in each])
            .to(device)
            .contiguous()
            for each, handle in zip((*own, flags), handles)
        )
        self.inboxes, self.parts, self.results = inboxes.unbind(), divided[0], divided[1:]
        self.part, self.normed, self.total = own[1]
        ranks.least(0, device)  # all have emptied theirs

    @classmethod
    def limits(cls, row: int, ranks: int) -> tuple[int, int]:
        """Up to how many tokens of so many bytes all send their whole parts, and up to how many tokens are divided."""
        tokens = cls.max_bytes // row
        return min(PUSHED.get(ranks, 0) // (row * (ranks - 1)), tokens), tokens

    @classmethod
    def of(cls, ranks: Ranks, dtype: torch.dtype, device: torch.device, size: int) -> "SharedSums | None":
        """None where the GPUs of the processes cannot read each other's memory. `size`: of a token's hidden state."""
        own = torch.tensor([zlib.crc32(socket.gethostname().encode()), device.index or 0], device=device)
        hosts, indices = ranks.all_gather(own).unbind(1)
        others = [index for index in indices.tolist() if index != device.index]
        is_possible = cls.max_bytes > 0 and symmetric_memory is not None and len(set(hosts.tolist())) == 1
        is_possible &= len(set(others)) == ranks.size - 1 and ranks.size & (ranks.size - 1) == 0
        is_possible = is_possible and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
        return cls(ranks, dtype, device, size) if ranks.least(int(is_possible), device) else None

    def begin(self) -> None:
        """A forward pass begins."""
        self.turn = -1

    def covers(self, x: torch.Tensor) -> bool:
        return x.shape[:-1].numel() <= self.tokens

    def product_and_norm(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        total: torch.Tensor,
        norm: nn.Module,
        eps: float,
        rounds_once: bool,
        is_whole: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x @ weight.T`, summed over all GPUs, added to `total`, and its norm; and the new total.

        Args:
            is_whole: whether each GPU must have the total of all tokens. The next sum over so many tokens does not need it.

        Returns:
            Tensors that the next sum may overwrite.
        """
        x, weight = x.flatten(0, -2), weight.t()
        if len(x) <= self.pushed:
            return self._push(torch.mm(x, weight), total, norm, eps, rounds_once)
        torch.mm(x, weight, out=self.part[: len(x)])
        return self._divide(total, norm, eps, rounds_once, is_whole)

    def sum_and_norm(
        self, x: torch.Tensor, total: torch.Tensor, norm: nn.Module, eps: float, rounds_once: bool, is_whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, summed over all GPUs, added to `total`, and its norm; and the new total: see [`product_and_norm`]."""
        x = x.flatten(0, -2)
        if len(x) <= self.pushed:
            return self._push(x, total, norm, eps, rounds_once)
        self.part[: len(x)].copy_(x)
        return self._divide(total, norm, eps, rounds_once, is_whole)

    def _push(self, x, total, norm, eps: float, rounds_once: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.turn = 2 if self.turn < 0 else self.turn & 1 ^ 1
        inboxes, rank = self.inboxes[self.turn], self.ranks.rank
        return push_add_rms_norm(x, inboxes, rank, self.room, total, norm.weight, eps, rounds_once)

    def _divide(self, total, norm, eps: float, rounds_once: bool, is_whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        places = (self.parts, self.flags, self.ranks.rank)
        divide_add_rms_norm(*places, total, norm.weight, eps, self.results, is_whole, rounds_once)
        number = total.shape[:-1].numel()
        return self.normed[:number].view_as(total), self.total[:number].view_as(total)
