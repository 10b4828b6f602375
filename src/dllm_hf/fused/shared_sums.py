"""`SharedSums`: sums over GPUs that read each other's memory. At the size of a denoising step they take less time than an
all-reduce of NCCL, and they are a part of the norm that follows."""

import socket
import zlib

import torch
from torch import nn

from ..generation.ranks import Ranks
from ..kernels.reduce import reduce_add_rms_norm

try:
    from torch.distributed import _symmetric_memory as symmetric_memory
except ImportError:  # a build of PyTorch without distributed
    symmetric_memory = None  # type: ignore[assignment]


class SharedSums:
    """Two buffers of each GPU that all can read, and flags. Sums use them in turn: who begins the second knows that all have read the
    first, so that the third may overwrite it. From one forward pass to the next the reductions of embedding and head see to
    that.

    Args:
        ranks: see [`SharedSums.of`].

    Attributes:
        max_bytes: of what a GPU may read from the others for a sum; NCCL needs less for larger ones.
    """

    max_bytes = 4 * 2**20

    def __init__(self, ranks: Ranks, dtype: torch.dtype, device: torch.device, size: int):
        self.ranks, self.size, self.turn = ranks, size, 0
        self.tokens = self.max_bytes // (size * dtype.itemsize * (ranks.size - 1))
        self.buffers = symmetric_memory.empty(2, self.tokens, size, dtype=dtype, device=device)
        flags = symmetric_memory.empty(2, self.tokens, ranks.size, dtype=torch.int32, device=device).zero_()
        of_buffers, of_flags = (symmetric_memory.rendezvous(each, ranks.group) for each in (self.buffers, flags))
        self._handles = of_buffers, of_flags, flags  # which keep the memory
        # By turn, the addresses on all GPUs.
        addresses = lambda handle, step: [
            torch.tensor([address + turn * step for address in handle.buffer_ptrs], dtype=torch.int64, device=device)
            for turn in range(2)
        ]
        self.parts, self.flags = addresses(of_buffers, self.buffers[0].nbytes), addresses(of_flags, flags[0].nbytes)
        ranks.least(0, device)  # all have zeros there

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
        self.turn = 0

    def covers(self, x: torch.Tensor) -> bool:
        return x.shape[:-1].numel() <= self.tokens

    def product_and_norm(
        self, weight: torch.Tensor, x: torch.Tensor, total: torch.Tensor, norm: nn.Module, eps: float, rounds_once: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x @ weight.T`, summed over all GPUs, added to `total`, and its norm; and the new total."""
        torch.mm(x.flatten(0, -2), weight.t(), out=self._next(total))
        return self._sum_and_norm(total, norm, eps, rounds_once)

    def sum_and_norm(
        self, x: torch.Tensor, total: torch.Tensor, norm: nn.Module, eps: float, rounds_once: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, summed over all GPUs, added to `total`, and its norm; and the new total."""
        self._next(total).copy_(x.flatten(0, -2))
        return self._sum_and_norm(total, norm, eps, rounds_once)

    def _next(self, total: torch.Tensor) -> torch.Tensor:
        """The buffer of the next sum."""
        self.turn ^= 1
        return self.buffers[self.turn, : total.shape[:-1].numel()]

    def _sum_and_norm(self, total, norm, eps: float, rounds_once: bool) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = (
            self.parts[self.turn],
            self.flags[self.turn],
            self.ranks.rank,
            total,
            norm.weight,
            eps,
            rounds_once,
        )
        return reduce_add_rms_norm(*arguments)
