"""The key-value cache of the canvas and the policies that say what a denoising step feeds and sees."""

import hashlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .canvas import Block, Canvas, Window, span_columns

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
    """Keys and values of one layer, `(batch, kv_heads, width, head_dim)`, allocated once and written by column."""

    is_sliding = False

    def __init__(self, width: int):
        super().__init__()
        self.width = self.visible = width
        self.columns: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, head_dim = states.shape
            setattr(self, name, states.new_zeros(batch, heads, self.width, head_dim))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the window's keys and values in place and return those of all visible columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if self.columns is None:
                buffer[:, :, : states.shape[2]].copy_(states)
            else:
                index = self.columns[:, None, :, None].expand_as(states)
                buffer.scatter_(2, index, states)
        return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]

    def reset(self) -> None:
        """Give the buffers back: the next text may have other rows."""
        self.keys = self.values = None
        self.is_initialized = False

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        if self.is_initialized:
            self.keys, self.values = (x.index_select(0, rows.to(self.device)) for x in (self.keys, self.values))

    def widen(self, width: int) -> None:
        """Make room for a longer canvas; what is written stays."""
        if self.is_initialized and width > self.width:
            pad = (0, 0, 0, width - self.width)
            self.keys = torch.nn.functional.pad(self.keys, pad)
            self.values = torch.nn.functional.pad(self.values, pad)
        self.width = max(self.width, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible, 0

    def get_seq_length(self) -> int:
        # A window says itself where it stands (position ids): nothing is appended, so nothing is "seen".
        return 0

    def get_max_length(self) -> int:
        return self.width

    # The name of the method above before transformers 5.13.
    get_max_cache_shape = get_max_length


class CanvasCache(Cache):
    """A cache indexed by position. The loop calls [`CanvasCache.place`] before a forward pass; the attention layers
    then `update` it as they do any other cache, and get back the keys and values of the visible columns.

    After a call it remembers for the next one what it holds: columns before `written` are the final keys and values
    of `tokens`, decoded in blocks of `block_length`.

    Args:
        model: whose keys and values these are.
        width: columns to make room for.
    """

    layer_class: type[CacheLayerMixin] = CanvasCacheLayer

    def __init__(self, model: PreTrainedModel, width: int):
        super().__init__(layers=[self.layer_class(width) for _ in range(model.config.num_hidden_layers)])
        self.identity: str | None = None  # of the model whose keys and values these are, once it has decoded
        self.is_block_causal = False
        self.tokens: torch.Tensor | None = None
        self.written: list[int] = []
        self.block_length: int | None = None
        self.graphs = None  # the `StepGraphs` that read it, from one call to the next

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
            self.written = self.retreat(self.written, [kept] * len(self.written), self.block_length)
            self.tokens = self.tokens[:, :kept]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, `(rows,)`."""
        for layer in self.layers:
            layer.select(indices)
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, indices.to(self.tokens.device))
        self.written = [self.written[row] for row in indices.tolist()] if self.written else []

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

    def place(self, window: Window) -> None:
        """Say where the next window stands and what it sees."""
        self.is_block_causal = window.is_block_causal
        for layer in self.layers:
            layer.columns, layer.visible = window.columns, window.visible

    def remember(self, tokens: torch.Tensor, written: list[int], block_length: int) -> None:
        """What a later call can rely on. The last block is not in it: its keys are older than its last tokens, and
        the call that goes on from here computes them with what is new."""
        self.tokens, self.written, self.block_length = tokens, written, block_length

    def restart(self) -> None:
        """Make the cache ready for a text that has nothing to do with the last one, in the same buffers."""
        self.tokens, self.written, self.block_length = None, [], None

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
        written = self.retreat(self.written, same, block_length)
        # What lies behind is written over from now on, also if the call should fail.
        self.remember(tokens.clone(), written, block_length)
        return written

    def retreat(self, written: list[int], columns: list[int], block_length: int) -> list[int]:
        """Forget what depends on tokens from `columns` on.

        Args:
            written, columns: for each row, the column up to which it is final, and the first one that changed.

        Returns:
            For each row, the column up to which it is final now.
        """
        return [min(row, end // block_length * block_length) for row, end in zip(written, columns, strict=True)]

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


class CachePolicy:
    """What one denoising step feeds to the model.

    Args:
        canvas: the canvas.
        logits_shift: the logits of a position stand that many columns before it.
    """

    def __init__(self, canvas: Canvas, logits_shift: int):
        self.canvas, self.logits_shift = canvas, logits_shift

    def prefill(self, block: Block, running: list[bool]) -> Iterator[Window]:
        """Windows to compute before the block starts, whose logits nobody needs."""
        return iter(())

    def first_window(self, block: Block, running: list[bool]) -> Window:
        """The window of a block's first forward pass. `running`: the rows that have not ended."""
        keep = (block.columns - self.logits_shift).clamp(min=0)
        return Window(None, keep, self.canvas.width, self.canvas.key_mask)

    def next_window(self, block: Block, running: list[bool]) -> Window:
        """The window of its other forward passes."""
        raise NotImplementedError

    def rewind(self, changed: list[int]) -> bool:
        """Take note that a hook changed each row from that column on. Whether the next step needs a first window."""
        return False

    def from_block_to(self, ends: torch.Tensor, width: int, block: Block) -> Window:
        """The columns from the block's start, or from the logits of its first position, up to `ends`."""
        columns, _ = span_columns(block.starts - self.logits_shift, ends, width + self.logits_shift)
        keep = torch.arange(block.columns.shape[1], device=columns.device).expand_as(block.columns)
        return Window(columns, keep, self.canvas.width, self.canvas.key_mask)


class NoCache(CachePolicy):
    """`none`: every step feeds and sees the whole canvas. Exact."""

    def next_window(self, block: Block, running: list[bool]) -> Window:
        return self.first_window(block, running)


class PrefixCache(CachePolicy):
    """`prefix`: a block's first step feeds the whole canvas, the others the block and everything after it; what stands
    before the block is as old as the block's first step. Fast-dLLM, arXiv:2505.22618, section 3.2."""

    def next_window(self, block: Block, running: list[bool]) -> Window:
        width = max(self.canvas.width - start for start, _ in block.spans)
        return self.from_block_to(self.canvas.ends, width, block)


class DualCache(CachePolicy):
    """`dual`: as `prefix`, but the other steps feed the block alone, and what stands after it is old as well."""

    def next_window(self, block: Block, running: list[bool]) -> Window:
        return self.from_block_to(block.ends, block.columns.shape[1], block)


class BlockCache(CachePolicy):
    """`block`: for models whose blocks see only earlier ones. A step feeds the block; its first step feeds with it
    whatever is final but not yet in the cache: the prompt before the first block, then each finished block. Exact.

    Args:
        cache: its cache.
        written: for each row, the column up to which the cache holds what is final.
        chunk: of what stands before a block, its first step feeds so many columns at most; the rest is computed ahead
            in pieces of this size, so that memory grows with the length of a prompt and not with its square.
        block_length: of the blocks.
    """

    def __init__(
        self,
        canvas: Canvas,
        logits_shift: int,
        cache: CanvasCache,
        written: list[int],
        chunk: int,
        block_length: int,
    ):
        super().__init__(canvas, logits_shift)
        self.cache, self.written, self.block_length = cache, written, block_length
        # A piece must not end inside a block, whose tokens see each other.
        self.chunk = max(chunk // block_length, 1) * block_length

    def prefill(self, block: Block, running: list[bool]) -> Iterator[Window]:
        takes_part = self._takes_part(block, running)
        starts = [start if busy else 0 for busy, (start, _) in zip(takes_part, block.spans)]
        # A hook may have put masks back into a finished block, before the column that the cache has come to.
        ends = [start if busy else written for busy, start, written in zip(takes_part, starts, self.written)]
        self.written = self.cache.retreat(self.written, ends, self.block_length)
        while max(start - written for start, written in zip(starts, self.written)) > self.chunk:
            ends = [min(written + self.chunk, start) for start, written in zip(starts, self.written)]
            yield self._window([*zip(self.written, ends)], settled=ends)
            self.written = [max(pair) for pair in zip(self.written, ends)]

    def first_window(self, block: Block, running: list[bool]) -> Window:
        takes_part = self._takes_part(block, running)
        spans = [
            (min(written, start), end) if busy else (0, 0)
            for busy, (start, end), written in zip(takes_part, block.spans, self.written)
        ]
        # The block's own keys are not final: the next block's first step writes them again.
        self.written = [
            start if busy else written for busy, (start, _), written in zip(takes_part, block.spans, self.written)
        ]
        window = self._window(spans, settled=self.written)
        starts = torch.tensor([start for start, _ in spans], device=block.columns.device)
        return replace(window, keep=self._keep(block, starts, window))

    def next_window(self, block: Block, running: list[bool]) -> Window:
        takes_part = self._takes_part(block, running)
        window = self._window([span if busy else (0, 0) for busy, span in zip(takes_part, block.spans)])
        keep = self._keep(block, block.starts, window)
        ends = {end for busy, (_, end) in zip(takes_part, block.spans) if busy}
        key_mask = None
        if len(ends) > 1:
            key_mask = torch.arange(window.visible, device=keep.device) < block.ends[:, None]
        return replace(window, keep=keep, key_mask=key_mask, is_block_causal=False)

    def rewind(self, changed: list[int]) -> bool:
        before = self.written
        self.written = self.cache.retreat(before, changed, self.block_length)
        return self.written != before

    def _takes_part(self, block: Block, running: list[bool]) -> list[bool]:
        return [run and end > start for run, (start, end) in zip(running, block.spans)]

    def _keep(self, block: Block, starts: torch.Tensor, window: Window) -> torch.Tensor:
        """Where the logits of the block's positions stand in a window that begins at `starts`; -1 stands for the column
        before it."""
        keep = (block.columns - self.logits_shift).clamp(min=0) - starts[:, None]
        return keep.clamp(-self.logits_shift, window.columns.shape[1] - 1)

    def _window(self, spans: list[tuple[int, int]], settled: list[int] | None = None) -> Window:
        """A block-causal window over (start, end) of each row, without logits. A row that has nothing to compute feeds
        the column behind the canvas, which is nobody's."""
        behind = self.canvas.width
        filled = [(start, end) if end > start else (behind, behind + 1) for start, end in spans]
        starts, ends = torch.tensor(filled, device=self.canvas.tokens.device).unbind(1)
        columns, _ = span_columns(starts, ends, max(end - start for start, end in filled))
        if settled is not None:
            settled = torch.tensor(settled, device=columns.device)[:, None]
        visible = max(end for _, end in spans)
        return Window(columns, columns[:, :0], visible, None, is_block_causal=True, settled=settled)


POLICIES = {"none": NoCache, "prefix": PrefixCache, "dual": DualCache}
