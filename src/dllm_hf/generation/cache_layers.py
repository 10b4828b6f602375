"""What a layer keeps of the canvas: its keys and values, in the model's type or in 8 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from ..kernels.attention import canvas_attention, canvas_attention_torch
from ..kernels.columns import copy_columns, copy_columns_torch
from ..kernels.eight_bits import dequantised, quantised
from ..kernels.layers import rotate_and_store, rotate_and_store_torch
from ..kernels.triton import has_kernels
from .window import Window


class CanvasCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, `(slots, kv_heads, width, head_dim)`, allocated once and written by column. In memory
    they are one arena, `(kv_heads, slots * width, head_dim)`, in which a slot is the extent that begins at `slot * width`.

    What a pass computes is stored and read by the layer alone: `update` and `read` for a model's own forward pass,
    `rotate_and_write` and `attend` for the fused one.

    Attributes:
        window: of the next forward pass; without one, a pass writes the columns from 0 on and sees all.
        arena: where slots have extents of different lengths (keys and values are `(1, kv_heads, columns, head_dim)` then), or
            the window has drafts: the columns of the arena that the window writes, `(rows, window)`, and those that its rows
            see, `(rows, visible)`.
        slots: the number to allocate; None: as many as the first pass has rows.
        spare_slots: that are allocated behind them, for draft columns.
        buffers: the names of the tensors that hold columns.
        encoding: of keys and values in 8 bits, see [`eight_bits`].
    """

    is_sliding = False
    buffers: tuple[str, ...] = ("keys", "values")
    encoding: str | None = None
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.window: Window | None = None
        self.slots: int | None = None
        self.spare_slots = 0
        self.arena: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def bytes_of(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the key and the value of a head and column. `dtype`: that of the model."""
        return 2 * head_dim * dtype.itemsize

    @staticmethod
    def has_kernels(device: torch.device) -> bool:
        """Whether our kernels can read and write it on a GPU."""
        return True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in self._formatted(key_states, value_states).items():
            rows, heads, _, size = states.shape
            zeros = states.new_zeros(heads, (self.slots or rows) + self.spare_slots, self.width, size)
            setattr(self, name, zeros.transpose(0, 1))
        self.is_initialized = True

    def _formatted(self, key_states: torch.Tensor, value_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the buffers hold of keys and values, `(rows, kv_heads, window, any)` each."""
        return {"keys": key_states, "values": value_states}

    def _restored(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what the buffers hold."""
        return keys, values

    def arenas(self) -> list[torch.Tensor]:
        """The buffers as `(kv_heads, slots * width, any)`: keys, values, and what else there is."""
        return [getattr(self, name).transpose(0, 1).flatten(1, 2) for name in self.buffers]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the window's keys and values in place and return those of all visible columns of its rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.write(key_states, value_states)
        return self.read()

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write the window's keys and values in place, `(rows, kv_heads, window, head_dim)`."""
        window, formatted = self.window, self._formatted(key_states, value_states)
        if self.arena is not None:
            for arena, name in zip(self.arenas(), self.buffers):
                arena[:, self.arena[0]] = formatted[name].transpose(0, 1)
            return
        for name, states in formatted.items():
            buffer = getattr(self, name)
            if window is None:
                buffer[:, :, : states.shape[2]].copy_(states)
            else:
                buffer.transpose(1, 2)[window.slots[:, None], window.columns] = states.transpose(1, 2)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all visible columns of the window's rows."""
        if self.arena is not None:
            return self._restored(*(arena[:, self.arena[1]].transpose(0, 1) for arena in self.arenas()))
        return self._restored(*(self._visible(getattr(self, name)) for name in self.buffers))

    def _visible(self, buffer: torch.Tensor) -> torch.Tensor:
        window = self.window
        if window is None:
            return buffer
        rows = buffer[: len(window.slots)] if window.is_every_slot else buffer.index_select(0, window.slots)
        return rows[:, :, : window.visible]

    @property
    def _on_kernels(self) -> bool:
        return has_kernels(self.keys)

    def rotate_and_write(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places) -> torch.Tensor:
        """Rotate queries and keys, and write keys and values. `places`: cosines, sines, columns of the arena, and norms where
        there are any, see [`rotate_and_store`]. Returns the queries."""
        (cos, sin, columns, *norms), (keys, values, scales, *_) = places, [*self.arenas(), None]
        run = rotate_and_store if self._on_kernels else rotate_and_store_torch
        others = [*(norms or (None, None, 0.0)), scales, self.encoding]
        return run(query, key, value, cos, sin, columns, keys, values, *others)

    def attend(
        self, query: torch.Tensor, lengths, base, width, scale, runs=None, longest=0, shared=None, own=None, cascade=None
    ) -> torch.Tensor:  # fmt: skip
        """Attention to what is written. The arguments and the result are those of [`canvas_attention`]."""
        keys, values, scales, *_ = [*self.arenas(), None]
        run = canvas_attention if self._on_kernels else canvas_attention_torch
        places = (lengths, base, width, scale, runs, longest, shared, own, scales, self.encoding)
        return run(query, keys, values, *places, cascade=cascade)

    def copy_runs(self, runs: torch.Tensor, longest: int) -> None:
        """Copy runs of columns of the arena. The arguments are those of [`copy_columns`]."""
        run = copy_columns if self._on_kernels else copy_columns_torch
        for arena in self.arenas():
            run(arena, runs, longest)

    def reset(self) -> None:
        """Free the buffers: the next text may have another number of rows."""
        super().__init__()

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        if self.is_initialized:
            rows = rows.to(self.device)
            self._replace(lambda arena: arena.index_select(1, rows))

    def make_spare_slots(self, number: int) -> None:
        self.spare_slots = number
        missing = (self.slots or 0) + number - len(self.keys) if self.is_initialized else 0
        if missing > 0:
            self._replace(lambda arena: nn.functional.pad(arena, (0, 0, 0, 0, 0, missing)))

    def widen(self, width: int) -> None:
        """Make room for a longer canvas; the columns that are there stay."""
        if self.is_initialized and width > self.width:
            self._replace(lambda arena: nn.functional.pad(arena, (0, 0, 0, width - self.width)))
        self.width = max(self.width, width)

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`change`: of `(kv_heads, slots, width, any)`, so that the result is an arena again."""
        for name in self.buffers:
            setattr(self, name, change(getattr(self, name).transpose(0, 1)).transpose(0, 1))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width if self.window is None else self.window.visible, 0

    def get_seq_length(self) -> int:
        # Nothing is appended: the window's position ids say where it stands.
        return 0

    def get_max_length(self) -> int:
        return self.width


class EightBitCacheLayer(CanvasCacheLayer):
    """Keys and values in 8 bits, see [`eight_bits`]. Both paths read them so, those too that the same pass has written.

    Attributes:
        keys, values: uint8, for fp8 the bytes of float8_e4m3: of that type itself, PyTorch has few operations.
        scales: `(slots, kv_heads, width, 2)` bfloat16, of keys and of values.
    """

    buffers = ("keys", "values", "scales")
    encoding: str
    scales: torch.Tensor

    @staticmethod
    def bytes_of(head_dim: int, dtype: torch.dtype) -> int:
        return 2 * (head_dim + torch.bfloat16.itemsize)

    def _formatted(self, key_states: torch.Tensor, value_states: torch.Tensor) -> dict[str, torch.Tensor]:
        keys, of_keys = quantised(key_states, self.encoding, is_key=True)
        values, of_values = quantised(value_states, self.encoding, is_key=False)
        return {"keys": keys, "values": values, "scales": torch.stack([of_keys, of_values], dim=-1)}

    def _restored(self, keys, values, scales=None) -> tuple[torch.Tensor, torch.Tensor]:
        (of_keys, of_values), kind = scales.unbind(-1), (self.dtype, self.encoding)
        return dequantised(keys, of_keys, *kind), dequantised(values, of_values, *kind)


class Float8CacheLayer(EightBitCacheLayer):
    encoding = "fp8"

    @staticmethod
    def has_kernels(device: torch.device) -> bool:
        return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)  # older ones lack the type


class Int8CacheLayer(EightBitCacheLayer):
    encoding = "int8"


# By the option `cache_dtype`; None is the model's own type.
CACHE_LAYERS: dict[str | None, type[Any]] = {
    kind.encoding: kind for kind in (CanvasCacheLayer, Float8CacheLayer, Int8CacheLayer)
}
