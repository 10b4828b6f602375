"""The key-value cache of the canvas, with the tokens of the conversation that it belongs to."""

import hashlib
import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache

from ..kernels.attention import Cascade, place_in_arena
from .cache_layers import CACHE_LAYERS, CanvasCacheLayer
from .configuration import DiffusionGenerationConfig
from .contract import DenoisingModel
from .extents import Extents
from .ranks import divides_heads, ranks_of
from .uploads import uploaded
from .window import RUN_LENGTH, Window

# Columns; more would take more memory beside the cache.
MOVED_AT_ONCE = 16384

# Not attributes of the caches: locks can be neither copied nor pickled.
_locks: "weakref.WeakKeyDictionary[CanvasCache, threading.Lock]" = weakref.WeakKeyDictionary()
_identities: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


def identity_of(model: DenoisingModel) -> str:
    """A hash of the model's configuration and of the first values of its weights at the first call: the same for the same
    model in another process."""
    if model not in _identities:
        plain = [each for each in model.parameters() if type(each) in (nn.Parameter, torch.Tensor) and not each.is_meta]
        values = torch.cat([each.detach().flatten()[:8].double().cpu() for each in plain] or [torch.zeros(0)])
        # The library writes `is_causal` into some configurations at the first pass.
        config = {name: value for name, value in model.config.to_dict().items() if name != "is_causal"}
        text = f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)} {values.tolist()}"
        _identities[model] = hashlib.sha256(text.encode()).hexdigest()
    return _identities[model]


def column_bytes_of(model: DenoisingModel, cache_dtype: str | None = None) -> int:
    """Bytes that a column of a row takes in the key-value cache of a model, or of this process' part of it."""
    config, ranks = model.config, ranks_of(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if ranks is not None and divides_heads(model.tp_plan):  # type: ignore[arg-type]  # of `PreTrainedModel`
        heads = max(heads // ranks.size, 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * heads * CACHE_LAYERS[cache_dtype].bytes_of(head_dim, model.dtype)


class Copy(NamedTuple):
    """What the row in slot `target` takes over: what `source`, final up to `final_length`, holds before `column`."""

    source: int
    target: int
    final_length: int
    column: int
    block_length: int


class CanvasCache(Cache):
    """A cache indexed by position. The loop calls [`CanvasCache.set_window`] before a forward pass; the attention layers
    then `update` it as they do any other cache, and get back the keys and values of the visible columns.

    Args:
        model: whose keys and values these are.
        width: columns to make room for.

    Attributes:
        identity: of the model, see [`identity_of`], once it has decoded.
        tokens: `(batch, width)`, the canvas of the last call; None before the first.
        final_lengths: for each row, the column before which keys and values are final ones of `tokens`.
        block_length: of the blocks in which `tokens` were decoded.
        workspace: the buffers and graphs that read the cache's tensors, kept from one call to the next.
        extents: where each slot has an extent of its own length; None where all have `width` columns.
        cache_dtype: of keys and values, see [`DiffusionGenerationConfig`].
    """

    layer_class: type[Any] = CanvasCacheLayer
    layers: list[Any]  # of `layer_class`, which each kind of cache chooses, or of the one of another type

    def __init__(self, model: DenoisingModel, width: int):
        super().__init__(layers=[self.layer_class(width) for _ in range(model.config.num_hidden_layers)])
        self.cache_dtype: str | None = None
        self.identity: str | None = None
        self.tokens: torch.Tensor | None = None
        self.final_lengths: list[int] = []
        self.block_length = 0
        self.workspace: Any = None
        self.extents: Extents | None = None

    @contextmanager
    def used_by_one(self) -> Iterator[None]:
        """Raises a `ValueError` if another thread decodes on this cache."""
        lock = _locks.setdefault(self, threading.Lock())
        if not lock.acquire(blocking=False):
            raise ValueError(
                "`past_key_values` is in use by another call: wait for it, or give each thread a cache of its own "
                "(`copy.deepcopy(past_key_values)`)."
            )
        try:
            yield
        finally:
            lock.release()

    def reset(self) -> None:
        """Free the buffers and forget the conversation."""
        super().reset()
        CanvasCache.restart(self)  # not a subclass's, which clears the buffers that are gone

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
            self.final_lengths = [self.final_lengths[row] for row in indices.tolist()]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    @property
    def rows(self) -> int | None:
        """The number of rows that the cache holds; None before the first call."""
        return None if self.tokens is None else len(self.tokens)

    def layer_tensors(self) -> list[torch.Tensor]:
        """All tensors of the layers."""
        held = (value for layer in self.layers for value in vars(layer).values())
        return [value for value in held if isinstance(value, torch.Tensor)]

    def use_dtype(self, cache_dtype: str) -> None:
        """Keep keys and values in another type than the model's. Before all else."""
        self.cache_dtype = cache_dtype
        self.layers = [CACHE_LAYERS[cache_dtype](layer.width) for layer in self.layers]

    def reserve(self, slots: int) -> None:
        """Set the number of slots to allocate, also if the first pass feeds fewer rows."""
        for layer in self.layers:
            layer.slots = slots

    def use_arena(self, slots: int, columns: int, device: torch.device) -> None:
        """Give slots extents of different lengths, in an arena of so many columns. Before the first pass."""
        move = partial(_move, self.layers)  # not a method: a cycle would keep the arena until garbage is collected
        self.extents = Extents(slots, columns, self.layers[0].width, device, move)
        for layer in self.layers:
            layer.slots, layer.width = 1, columns

    def make_draft_columns(self, number: int) -> None:
        """Make room for what the drafts of a pass write, see [`Window`]; after [`reserve`] or [`use_arena`]."""
        for layer in self.layers:
            if self.extents is None:
                layer.make_spare_slots(-(-number // layer.width))
            else:
                layer.width = self.extents.columns + number

    def set_window(self, window: Window) -> None:
        """Set the window of the next forward pass."""
        arena = None
        if self.extents is not None or window.draft_columns:
            base, shared, own, written = self.locate(window)
            column = torch.arange(window.visible, device=base.device)
            shared, own = (None if each is None else each[..., None] for each in (shared, own))
            seen = place_in_arena(column, base[:, None], shared, own)
            # An extent at the end may be shorter than what the longest row sees.
            layer = self.layers[0]
            arena = written, seen.clamp(max=layer.width * (layer.slots + layer.spare_slots) - 1)
        for layer in self.layers:
            layer.window, layer.arena = window, arena

    def locate(self, window: Window) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """Where in the arena the canvases of a window's rows are, in a list those of its runs; and which column of the arena
        each token has. The last column of an extent is its scratch column.

        Returns:
            `(rows,)` or `(runs,)`, the place of a canvas' first column; `(2, rows)` or `(2, runs)`, where shared columns
            begin, and how many they are, None where nothing can be shared, see [`Extents`]; `(3, rows)` or `(3, runs)`, the
            columns that a draft has for itself, see [`canvas_attention`], None without drafts; of the shape of
            `window.columns`, the column of each token.
        """
        layer = self.layers[0]
        readers = window.runs[:, 0] if len(window.runs) else window.slots
        if self.extents is None:
            base, shared, written = readers * layer.width, None, window.owners * layer.width + window.columns
        else:
            of_reader, (begins, size, *beginning) = self.extents.table[:, readers], self.extents.table[:, window.owners]
            written = place_in_arena(torch.minimum(window.columns, size - 1), begins, beginning)
            base, shared = of_reader[0], of_reader[2:]
        if not window.draft_columns:
            return base, shared, None, written
        behind = layer.width * layer.slots if self.extents is None else self.extents.columns
        first, last, begin = window.own.unbind(1)
        own = torch.stack([first, last, behind + begin])
        return base, shared, own, torch.where(window.aside < 0, written, behind + window.aside)

    def cascade(self, window: Window) -> Cascade | None:
        """What the tokens of a list read together; None where they do not."""
        if self.extents is None or not len(window.pieces):
            return None
        base = self.extents.table[2, window.pieces[:, 0]]
        return Cascade(window.beginnings[None], base, window.pieces, RUN_LENGTH, window.skipped)

    @property
    def longest_extent(self) -> int:
        """Columns of the longest extent that a slot may have, the scratch column included."""
        return self.layers[0].width if self.extents is None else self.extents.longest

    def remember(self, tokens: torch.Tensor, final_lengths: list[int], block_length: int) -> None:
        """Note what a later call can rely on. The last block is not final: its keys were computed before its last tokens
        were chosen, so that the later call computes it again."""
        self.tokens, self.final_lengths, self.block_length = tokens, final_lengths, block_length

    def restart(self) -> None:
        """Forget the conversation and keep the buffers."""
        self.tokens, self.final_lengths, self.block_length = None, [], 0

    def resume(self, tokens: torch.Tensor, block_length: int, width: int) -> list[int]:
        """Keep the columns that a new canvas has in common with the last one, and make room for the others.

        Args:
            tokens: `(batch, width)`, the new canvas.
            width: columns to make room for.

        Returns:
            For each row, the column up to which it need not be computed again.
        """
        if self.tokens is None:  # a pass without the loop may have written anything
            self.reset()
            self.tokens, self.final_lengths = tokens[:, :0], [0] * len(tokens)
        for layer in self.layers:
            layer.widen(width)
        shared = min(tokens.shape[1], self.tokens.shape[1])
        same = (tokens[:, :shared] == self.tokens[:, :shared]).long().cumprod(-1).sum(-1).tolist()
        every = enumerate(zip(self.final_lengths, same, strict=True))
        final = [self.forget(row, length, end, block_length) for row, (length, end) in every]
        # Later columns are overwritten from now on: should the call fail, the cache must not promise them.
        self.remember(tokens.clone(), final, block_length)
        return final

    def forget(self, slot: int, final_length: int, column: int, block_length: int) -> int:
        """Forget of a row what depends on its tokens from `column` on. Returns the column up to which the row, final up to
        `final_length` before, is final now."""
        return min(final_length, column // block_length * block_length)

    def share(self, copies: list[Copy]) -> list[int]:
        """See [`Backend.share`]."""
        columns = [copy.column // copy.block_length * copy.block_length for copy in copies]
        width, extents = self.layers[0].width, self.extents
        place = extents.place_of if extents is not None else lambda slot, column: slot * width + column
        runs = []
        for (source, target, *_), column in zip(copies, columns):
            # What the source shares stands elsewhere.
            first, cut = (0, 0) if extents is None else (extents.shared_of(target), extents.shared_of(source))
            for begin, end in ((first, min(cut, column)), (max(first, cut), column)):
                if source != target and begin < end:
                    runs.append((place(source, begin), place(target, begin), end - begin))
        if runs:
            table, longest = uploaded(torch.tensor(runs), self.layers[0].device), max(size for *_, size in runs)
            for layer in self.layers:
                layer.copy_runs(table, longest)
        return columns

    def check(self, model: DenoisingModel, batch: int, options: DiffusionGenerationConfig) -> None:
        """Raises a `ValueError` where this cache cannot serve a call."""
        if options.cache_policy != "block":
            raise ValueError(
                f"`past_key_values` needs `cache_policy='block'`, but it is {options.cache_policy!r}: only blocks "
                "that see no later ones have keys that stay valid."
            )
        if options.cfg_scale:
            raise ValueError(
                "`cfg_scale` masks the whole prompt, the earlier turns too, so that nothing of `past_key_values` "
                "would stay valid: start without it."
            )
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
        if self.cache_dtype != options.cache_dtype:
            raise ValueError(
                f"`past_key_values` was written with `cache_dtype={self.cache_dtype!r}`, but `cache_dtype="
                f"{options.cache_dtype!r}`: keep the type, or {remedy}."
            )
        if any(tensor.is_inference() for tensor in self.layer_tensors()) and not torch.is_inference_mode_enabled():
            raise ValueError(
                "`past_key_values` was made under `torch.inference_mode()` and can be written there only: go on under "
                f"it, or {remedy}."
            )
        if self.tokens is not None and self.block_length != options.block_length:
            raise ValueError(
                f"`past_key_values` was written in blocks of {self.block_length}, but `block_length={options.block_length}`: "
                f"keep the block length, or {remedy}."
            )


def _move(layers: list[CanvasCacheLayer], moves: list[tuple[int, int, int]]) -> None:
    """Copy runs of columns of the arena, each as its first column, that of its target, and its size. The targets stand one behind
    the other, each before its source, so that any piece can be copied once those before it have been."""
    sources = torch.cat([torch.arange(source, source + size) for source, _, size in moves])
    arenas = [arena for layer in layers if layer.is_initialized for arena in layer.arenas()]
    for start in range(0, len(sources), MOVED_AT_ONCE) if arenas else ():
        piece = uploaded(sources[start : start + MOVED_AT_ONCE], arenas[0].device)
        target = moves[0][1] + start
        for arena in arenas:
            arena[:, target : target + len(piece)] = arena.index_select(1, piece)
