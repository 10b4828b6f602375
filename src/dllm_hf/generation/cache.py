"""The key-value cache of the canvas, and what it remembers of a conversation."""

import hashlib
import threading
import weakref
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .window import Window

_lock = threading.Lock()
_in_use: "weakref.WeakSet[CanvasCache]" = weakref.WeakSet()
_identities: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def identity_of(model: nn.Module) -> str:
    """What tells a model from others, in another process too: its configuration and the first values of its weights, as
    they are when it is first asked for."""
    if model not in _identities:
        plain = [each for each in model.parameters() if type(each) in (nn.Parameter, torch.Tensor) and not each.is_meta]
        values = torch.cat([each.detach().flatten()[:8].double().cpu() for each in plain] or [torch.zeros(0)])
        text = f"{type(model).__name__} {model.config.to_json_string(use_diff=False)} {values.tolist()}"
        _identities[model] = hashlib.sha256(text.encode()).hexdigest()
    return _identities[model]


class CanvasCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, `(slots, kv_heads, width, head_dim)`, allocated once and written by column. In memory
    they are one arena, `(kv_heads, slots * width, head_dim)`, in which a slot is the extent that begins at `slot * width`."""

    is_sliding = False

    def __init__(self, width: int):
        super().__init__()
        self.width, self.window, self.slots = width, None, None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            rows, heads, _, head_dim = states.shape
            zeros = states.new_zeros(heads, self.slots or rows, self.width, head_dim)
            setattr(self, name, zeros.transpose(0, 1))
        self.is_initialized = True

    def arenas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as `(kv_heads, slots * width, head_dim)`."""
        return tuple(x.transpose(0, 1).flatten(1, 2) for x in (self.keys, self.values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the window's keys and values in place and return those of all visible columns of its rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        if window is None:
            return self._whole(key_states, value_states)
        seen = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.transpose(1, 2)[window.slots[:, None], window.columns] = states.transpose(1, 2)
            rows = buffer if window.is_every_slot else buffer.index_select(0, window.slots)
            seen.append(rows[:, :, : window.visible])
        return tuple(seen)

    def _whole(self, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for buffer, fresh in zip((self.keys, self.values), states, strict=True):
            buffer[:, :, : fresh.shape[2]].copy_(fresh)
        return self.keys, self.values

    def reset(self) -> None:
        """Give the buffers back: the next text may have other rows."""
        self.keys = self.values = None
        self.is_initialized = False

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        if self.is_initialized:
            rows = rows.to(self.device)
            self.keys, self.values = (
                x.transpose(0, 1).index_select(1, rows).transpose(0, 1) for x in (self.keys, self.values)
            )

    def widen(self, width: int) -> None:
        """Make room for a longer canvas; what is written stays."""
        if self.is_initialized and width > self.width:
            pad = (0, 0, 0, width - self.width)
            self.keys, self.values = (
                torch.nn.functional.pad(x.transpose(0, 1), pad).transpose(0, 1) for x in (self.keys, self.values)
            )
        self.width = max(self.width, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width if self.window is None else self.window.visible, 0

    def get_seq_length(self) -> int:
        # A window says itself where it stands (position ids): nothing is appended, so nothing is "seen".
        return 0

    def get_max_length(self) -> int:
        return self.width

    # The name of the method above before transformers 5.13.
    get_max_cache_shape = get_max_length


class CanvasCache(Cache):
    """A cache indexed by position. The loop calls [`CanvasCache.set_window`] before a forward pass; the attention layers
    then `update` it as they do any other cache, and get back the keys and values of the visible columns.

    After a call it remembers for the next one what it holds: columns before `final_lengths` are the final keys and values
    of `tokens`, decoded in blocks of `block_length`.

    Args:
        model: whose keys and values these are.
        width: columns to make room for.
    """

    layer_class: type[CacheLayerMixin] = CanvasCacheLayer

    def __init__(self, model: PreTrainedModel, width: int):
        super().__init__(layers=[self.layer_class(width) for _ in range(model.config.num_hidden_layers)])
        self.identity: str | None = None  # of the model whose keys and values these are, once it has decoded
        self.tokens: torch.Tensor | None = None
        self.final_lengths: list[int] = []
        self.block_length: int | None = None
        self.workspace = None  # the buffers and graphs that read it, from one call to the next

    @contextmanager
    def used_by_one(self):
        """Raises a `ValueError` if another thread decodes on this cache."""
        with _lock:
            if self in _in_use:
                raise ValueError(
                    "`past_key_values` is in use by another call: wait for it, or give each thread a cache of its own "
                    "(`copy.deepcopy(past_key_values)`)."
                )
            _in_use.add(self)
        try:
            yield
        finally:
            with _lock:
                _in_use.discard(self)

    def reset(self) -> None:
        """Forget everything: what comes next starts anew."""
        super().reset()
        CanvasCache.restart(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of the canvas."""
        if self.tokens is not None:
            kept = max(self.tokens.shape[1] - abs(tokens_to_remove), 0)
            self.final_lengths = [self.forget(0, each, kept, self.block_length) for each in self.final_lengths]
            self.tokens = self.tokens[:, :kept]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, `(rows,)`."""
        for layer in self.layers:
            layer.select(indices)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, indices.to(self.tokens.device))
        self.final_lengths = [self.final_lengths[row] for row in indices.tolist()] if self.final_lengths else []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    @property
    def rows(self) -> int | None:
        """Rows that the cache holds; None before the first."""
        return None if self.tokens is None else len(self.tokens)

    def layer_tensors(self) -> list[torch.Tensor]:
        """What its layers hold."""
        held = (value for layer in self.layers for value in vars(layer).values())
        return [value for value in held if isinstance(value, torch.Tensor)]

    def reserve(self, slots: int) -> None:
        """Say for how many rows there must be room, whatever the first pass feeds."""
        for layer in self.layers:
            layer.slots = slots

    def set_window(self, window: Window) -> None:
        """Say where the next window stands and what it sees."""
        for layer in self.layers:
            layer.window = window

    def remember(self, tokens: torch.Tensor, final_lengths: list[int], block_length: int) -> None:
        """What a later call can rely on. The last block is not in it: its keys are older than its last tokens, and
        the call that goes on from here computes them with what is new."""
        self.tokens, self.final_lengths, self.block_length = tokens, final_lengths, block_length

    def restart(self) -> None:
        """Make the cache ready for a text that has nothing to do with the last one, in the same buffers."""
        self.tokens, self.final_lengths, self.block_length = None, [], None

    def resume(self, tokens: torch.Tensor, block_length: int, width: int) -> list[int]:
        """Make the cache ready for a canvas that begins as the last one did.

        Args:
            tokens: `(batch, width)`, the new canvas.
            width: columns to make room for.

        Returns:
            For each row, the column up to which it need not be computed again.
        """
        if self.tokens is None:  # nothing is known of what it may hold
            self.reset()
            self.remember(tokens[:, :0], [0] * len(tokens), block_length)
        for layer in self.layers:
            layer.widen(width)
        shared = min(tokens.shape[1], self.tokens.shape[1])
        same = (tokens[:, :shared] == self.tokens[:, :shared]).long().cumprod(-1).sum(-1).tolist()
        every = enumerate(zip(self.final_lengths, same, strict=True))
        final = [self.forget(row, length, end, block_length) for row, (length, end) in every]
        # What lies behind is written over from now on, also if the call should fail.
        self.remember(tokens.clone(), final, block_length)
        return final

    def forget(self, slot: int, final_length: int, column: int, block_length: int) -> int:
        """Forget of a row what depends on its tokens from `column` on.

        Returns:
            The column up to which the row, which was final up to `final_length`, is final now.
        """
        return min(final_length, column // block_length * block_length)

    def share(self, source: int, target: int, final_length: int, column: int, block_length: int) -> int:
        """Copy what slot `source`, final up to `final_length`, holds before `column` to slot `target`.

        Returns:
            The column up to which `target` is final then.
        """
        column = column // block_length * block_length
        for layer in self.layers:
            if layer.is_initialized and source != target:
                for buffer in (layer.keys, layer.values):
                    buffer[target, :, :column] = buffer[source, :, :column]
        return column

    def check(self, model: PreTrainedModel, batch: int, block_length: int) -> None:
        """Raises a `ValueError` where this cache cannot serve a call."""
        remedy = "start the conversation without `past_key_values`"
        if self.identity not in (None, identity_of(model)) or len(self.layers) != model.config.num_hidden_layers:
            raise ValueError(f"`past_key_values` does not come from a call of this model: {remedy}.")
        if self.tokens is not None and len(self.tokens) != batch:
            raise ValueError(f"`past_key_values` holds {len(self.tokens)} rows, but the batch has {batch}: {remedy}.")
        layer = self.layers[0]
        if layer.is_initialized and (layer.dtype, layer.device) != (model.dtype, model.device):
            raise ValueError(
                f"`past_key_values` is {layer.dtype} on {layer.device}, but the model is {model.dtype} on "
                f"{model.device}: {remedy}."
            )
        if any(tensor.is_inference() for tensor in self.layer_tensors()) and not torch.is_inference_mode_enabled():
            raise ValueError(
                "`past_key_values` was made under `torch.inference_mode()` and can be written there only: go on under "
                f"it, or {remedy}."
            )
        if self.tokens is not None and self.block_length != block_length:
            raise ValueError(
                f"`past_key_values` was written in blocks of {self.block_length}, but `block_length={block_length}`: "
                f"keep the block length, or {remedy}."
            )
