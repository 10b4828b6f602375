"""The key-value cache of the canvas and the policies that say what a denoising step feeds and sees."""

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .canvas import Block, Canvas, Window, span_columns


class CanvasCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, `(batch, kv_heads, width, head_dim)`, allocated once and written by column."""

    is_sliding = False

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.columns: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, head_dim = states.shape
            setattr(self, name, states.new_zeros(batch, heads, self.width, head_dim))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the window's keys and values in place and return the whole buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if self.columns is None:
                buffer[:, :, : states.shape[2]].copy_(states)
            else:
                index = self.columns[:, None, :, None].expand_as(states)
                buffer.scatter_(2, index, states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_seq_length(self) -> int:
        # A window says itself where it stands (position ids): nothing is appended, so nothing is "seen".
        return 0

    def get_max_length(self) -> int:
        return self.width

    # The name of the method above before transformers 5.13.
    get_max_cache_shape = get_max_length


class CanvasCache(Cache):
    """A cache indexed by position. The loop calls [`CanvasCache.place`] before a forward pass; the attention layers
    then `update` it as they do any other cache, and get back the keys and values of the whole canvas.

    Args:
        num_layers: attention layers of the model.
        width: columns of the canvas.
    """

    def __init__(self, num_layers: int, width: int):
        super().__init__(layers=[CanvasCacheLayer(width) for _ in range(num_layers)])

    def place(self, columns: torch.Tensor | None) -> None:
        """Say where the next window stands: `(batch, window)` columns, or `None` for the whole canvas."""
        for layer in self.layers:
            layer.columns = columns


class CachePolicy:
    """What one denoising step feeds to the model.

    Args:
        canvas: the canvas.
        logits_shift: the logits of a position stand that many columns before it.
    """

    def __init__(self, canvas: Canvas, logits_shift: int):
        self.canvas, self.logits_shift = canvas, logits_shift

    def first_window(self, block: Block) -> Window:
        """The window of a block's first forward pass."""
        return Window(None, (block.columns - self.logits_shift).clamp(min=0))

    def next_window(self, block: Block) -> Window:
        """The window of its other forward passes."""
        raise NotImplementedError

    def from_block_to(self, ends: torch.Tensor, width: int, block: Block) -> Window:
        """The columns from the block's start, or from the logits of its first position, up to `ends`."""
        columns, _ = span_columns(block.starts - self.logits_shift, ends, width + self.logits_shift)
        keep = torch.arange(block.columns.shape[1], device=columns.device).expand_as(block.columns)
        return Window(columns, keep)


class NoCache(CachePolicy):
    """`none`: every step feeds and sees the whole canvas. Exact."""

    def next_window(self, block: Block) -> Window:
        return self.first_window(block)


class PrefixCache(CachePolicy):
    """`prefix`: a block's first step feeds the whole canvas, the others the block and everything after it; what stands
    before the block is as old as the block's first step. Fast-dLLM, arXiv:2505.22618, section 3.2."""

    def next_window(self, block: Block) -> Window:
        width = max(self.canvas.width - start for start, _ in block.spans)
        return self.from_block_to(self.canvas.ends, width, block)


class DualCache(PrefixCache):
    """`dual`: as `prefix`, but the other steps feed the block alone, and what stands after it is old as well."""

    def next_window(self, block: Block) -> Window:
        return self.from_block_to(block.ends, block.columns.shape[1], block)


POLICIES = {"none": NoCache, "prefix": PrefixCache, "dual": DualCache}
