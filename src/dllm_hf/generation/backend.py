"""Where logits come from: the protocol that the loop asks for, and the backend of the library's models."""

from contextlib import nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import create_bidirectional_mask

from ..kernels.tiles import queries_of_tile
from .attention import without_flash_attention
from .cache import CanvasCache, Copy, column_bytes_of
from .contract import DenoisingModel, StepForward
from .sampling import guide
from .window import Pays, Window

# Bytes of keys and values that a layer must not read again where rows read together what they share. That costs launches, and
# results in float32 that are written and read for two parts. 64 rows of 4 tokens that share 2,000 columns of SDAR-4B, 0.5 GB, an
# H100 reads in 47 microseconds together and in 73 to 88 apart, of which some 15 are those costs; from a quarter on it pays.
LEAST_SAVED = 2**27


class Backend(Protocol):
    """Anything that computes the logits of a canvas. It need not be an `nn.Module`; docs/backends.md has an example of
    twenty lines.

    Attributes:
        device: of tokens and windows.
        takes_lists: whether its windows are lists of tokens, see [`Window`], or rectangles.
        vocab_size: of the logits.
        logits_shift, block_grid, sees_earlier_blocks, confidence_source: see [`contract.DenoisingModel`]. `seeds_blocks` and
            `causal_context` may be left out; they are False then.
        takes_drafts: whether rows of a window may be drafts, which share the columns of a slot, see [`Window`]. It may be left
            out; it is False then.
        pays: when rows of a list read together the beginning that they share, see [`Window`]. It may be left out; they do
            not then.
    """

    device: torch.device
    takes_lists: bool
    vocab_size: int
    logits_shift: int
    block_grid: str
    sees_earlier_blocks: bool
    confidence_source: str

    def open(self, slots: int, width: int) -> Any:
        """An empty state, a cache or None, for `slots` rows of `width` columns. Raises a `ValueError` if it cannot be."""

    def covers(self, window: Window) -> bool:
        """Whether a pass over the window may be captured in a graph: its operations depend on shapes alone, and those come again."""

    def __call__(self, tokens: torch.Tensor, window: Window, state: Any) -> torch.Tensor:
        """Tokens of the shape of `window.columns` -> `(rows, block, vocab)` logits at `window.keep`, which the caller may
        write to."""

    def forget(self, state: Any, slot: int, final_length: int, column: int, block_length: int) -> int:
        """Forget what the state of a row, final up to `final_length`, holds of columns from `column` on. Returns the column
        up to which it is final now."""

    def share(self, state: Any, copies: list[Copy]) -> list[int]:
        """Give rows what others hold. Returns for each the column up to which its target is final then. Where blocks see all
        others, nothing can be shared: 0."""


class ModelBackend:
    """The backend of a model of this package, or of one that [`custom_generate`] has wrapped.

    Args:
        has_cache: whether passes read and write one.
        fused: runs the passes that it covers, see [`contract.StepForward`].
        compiles: whether its small passes go through `torch.compile`.
        draft_columns: the number of columns that the drafts of a pass may write, see [`Window`].
        arena_columns: of an arena for keys and values in which each row has as many columns as it needs; None gives every
            slot the same number.
        cache_dtype: of keys and values, see [`DiffusionGenerationConfig`].
        cfg_scale: of guidance. Above 0 every row has a second slot, `slots` further on, for the pass with its prompt masked.
    """

    def __init__(
        self,
        model: DenoisingModel,
        has_cache: bool,
        fused: StepForward | None = None,
        cfg_scale: float = 0.0,
        compiles: bool = False,
        arena_columns: int | None = None,
        cache_dtype: str | None = None,
        draft_columns: int = 0,
    ):
        self.arena_columns, self.cache_dtype, self.draft_columns = arena_columns, cache_dtype, draft_columns
        self.model, self.has_cache, self.fused, self.cfg_scale = model, has_cache, fused, cfg_scale
        self.compiled = torch.compile(fused.__call__, dynamic=False) if fused and compiles else None
        self.device, self.vocab_size = model.device, model.config.vocab_size
        self.logits_shift, self.block_grid = model.logits_shift, model.block_grid
        self.sees_earlier_blocks, self.confidence_source = model.sees_earlier_blocks, model.confidence_source
        self.seeds_blocks, self.causal_context = model.seeds_blocks, model.causal_context
        self.takes_lists = fused is not None and fused.takes_lists
        self.guidance_copies = 2 if cfg_scale else 1
        self.part = getattr(fused, "part", None)  # of the vocabulary, whose logits this process computes

    @cached_property
    def pays(self) -> Pays:
        """Of our kernels, see [`tiles`]."""
        config, is_float32 = self.model.config, self.model.dtype == torch.float32
        groups = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        column = column_bytes_of(self.model, self.cache_dtype) // config.num_hidden_layers
        tokens = max(queries_of_tile(is_float32, self.cache_dtype is not None) // groups, 1)
        return Pays(tokens, LEAST_SAVED // column)

    @property
    def takes_drafts(self) -> bool:
        return self.draft_columns > 0 or not self.has_cache

    def open(self, slots: int, width: int) -> CanvasCache | None:
        if not self.has_cache:
            return None
        cache = self.model.make_cache(width)
        if self.cache_dtype is not None:
            cache.use_dtype(self.cache_dtype)
        cache.reserve(slots * self.guidance_copies)
        if self.arena_columns is not None:
            cache.use_arena(slots, self.arena_columns, self.device)
        self.make_room(cache)
        if self.fused is not None:
            self.fused.prepare(cache, slots * self.guidance_copies)
        return cache

    def make_room(self, cache: CanvasCache) -> None:
        """Make room for the draft columns of a pass."""
        if self.draft_columns:
            cache.make_draft_columns(self.draft_columns * self.guidance_copies)

    def covers(self, window: Window) -> bool:
        return self.fused is not None and self.fused.covers(window) and self.fused.repeats(window)

    def forget(self, state: CanvasCache | None, slot: int, final_length: int, column: int, block_length: int) -> int:
        if state is None:
            return 0
        copies = (slot + copy * self.slots_of(state) for copy in range(self.guidance_copies))
        return min(state.forget(each, final_length, column, block_length) for each in copies)

    def share(self, state: CanvasCache | None, copies: list[Copy]) -> list[int]:
        return [0] * len(copies) if state is None else state.share(copies)

    def slots_of(self, state: CanvasCache) -> int:
        return state.layers[0].slots // self.guidance_copies

    def __call__(
        self, tokens: torch.Tensor, window: Window, state: CanvasCache | None, unconditional: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`unconditional`: the tokens with the prompt masked; needed for guidance."""
        if unconditional is not None:
            slots = 0 if state is None else self.slots_of(state)
            tokens, window = torch.cat([tokens, unconditional]), window.repeated(2, slots)
        if self.fused is not None and self.fused.covers(window):
            is_step = window.block.shape[1] and not window.is_canvas and self.fused.repeats(window)
            run = self.compiled if self.compiled and is_step else self.fused
            logits = run(tokens, window, state)
        else:
            logits = self._forward(tokens, window, state)
            if self.part is not None:  # the model gives all of them
                logits = logits[..., self.part.begin : self.part.end]
        return logits if unconditional is None else guide(logits, self.cfg_scale)

    def _forward(self, tokens: torch.Tensor, window: Window, state: CanvasCache | None) -> torch.Tensor:
        if state is not None:
            state.set_window(window)
        # FlashAttention aligns padded queries to the end of their keys, and ignores other masks.
        unfit = window.seen == "token" or (window.seen == "row" and state is not None and not window.is_canvas)
        with without_flash_attention(self.model.config) if unfit else nullcontext():
            return self.model(
                input_ids=tokens,
                attention_mask=self._mask(window, state),
                position_ids=window.columns,
                past_key_values=state,
                use_cache=state is not None,
                return_dict=True,
                logits_to_keep=window.keep,
            ).logits

    def _mask(self, window: Window, state: CanvasCache | None) -> torch.Tensor | BlockMask | None:
        """The attention mask of a window: None where every token sees all, `(rows, keys)`, or a 4-D mask."""
        lengths = window.lengths
        if not self.model.makes_masks:  # the model derives its mask; without a cache it must know the padding
            if state is not None or window.seen == "all":
                return None
            lengths = lengths.amax(-1, keepdim=True)
        elif self.sees_earlier_blocks and (window.seen == "token" or state is None):
            if self.model.config._attn_implementation == "sdpa":  # the library makes the same, in milliseconds
                return (torch.arange(window.visible, device=self.device) < lengths[..., None])[:, None]
            # The library reads only shape, dtype and device of the embeddings.
            like = torch.empty(*window.columns.shape, 1, dtype=self.model.dtype, device=self.device)
            sees = lambda row, head, query, key: key < lengths[row, query]
            return create_bidirectional_mask(
                self.model.config, like, None, past_key_values=state, and_mask_function=sees
            )
        elif window.seen == "all":
            return None
        return torch.arange(window.visible, device=self.device) < lengths[:, :1]
