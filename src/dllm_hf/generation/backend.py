"""Logits from anywhere: what the loop asks of a model, and how the library's models give it."""

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from transformers.masking_utils import create_bidirectional_mask

from .attention import without_flash_attention
from .cache import CanvasCache
from .contract import DenoisingModel, StepForward
from .sampling import guide
from .window import Window


class Backend(Protocol):
    """Whoever can give logits of a canvas. It needs no `nn.Module`; docs/backends.md has one of twenty lines.

    Attributes:
        device: where tokens and windows are to be.
        vocab_size: of the logits.
        logits_shift: the logits of position i stand at position i - `logits_shift`.
        block_grid: `"prompt"` aligns the blocks to the prompt's end, `"zero"` to position 0.
        sees_earlier_blocks: whether a block sees earlier ones alone, or a token the whole canvas.
        confidence_source: `"raw"` reads confidence from the logits as they are given, `"processed"` after temperature,
            top-k, top-p and min-p.
    """

    device: torch.device
    vocab_size: int
    logits_shift: int
    block_grid: str
    sees_earlier_blocks: bool
    confidence_source: str

    def open(self, slots: int, width: int) -> Any:
        """The state of so many rows of `width` columns, empty: a cache, or None. Raises a `ValueError` for what cannot be."""

    def covers(self, window: Window) -> bool:
        """Whether a pass over such a window is the same operations every time, so that it can be captured in a graph."""

    def __call__(self, tokens: torch.Tensor, window: Window, state: Any) -> torch.Tensor:
        """Logits, `(rows, block, vocab)`, at `window.keep`; the caller may write to them. `tokens`: `(rows, window)`."""

    def forget(self, state: Any, slot: int, final_length: int, column: int, block_length: int) -> int:
        """Forget of a row what depends on its tokens from `column` on. Returns the column up to which the state is final,
        which was `final_length`."""

    def share(self, state: Any, source: int, target: int, final_length: int, column: int, block_length: int) -> int:
        """Give the row in slot `target` what the one in slot `source`, final up to `final_length`, holds before `column`.
        Returns the column up to which `target` is final then. Where blocks see all others, nothing can be shared: 0."""


class ModelBackend:
    """A model of this package, or one that [`custom_generate`] has wrapped.

    Args:
        has_cache: whether passes read and write one.
        fused: runs the passes that it covers, see [`contract.StepForward`].
        compiles: whether its small passes go through `torch.compile`.
        cfg_scale: of guidance; above 0 every row takes a second slot, `slots` further on, in which its prompt is masked.
    """

    def __init__(
        self,
        model: DenoisingModel,
        has_cache: bool,
        fused: StepForward | None = None,
        cfg_scale: float = 0.0,
        compiles: bool = False,
    ):
        self.model, self.has_cache, self.fused, self.cfg_scale = model, has_cache, fused, cfg_scale
        self.fused_step = torch.compile(fused.__call__, dynamic=False) if fused and compiles else fused
        self.device, self.vocab_size = model.device, model.config.vocab_size
        self.logits_shift, self.block_grid = model.logits_shift, model.block_grid
        self.sees_earlier_blocks, self.confidence_source = model.sees_earlier_blocks, model.confidence_source
        self.repeats = 2 if cfg_scale else 1

    def open(self, slots: int, width: int) -> CanvasCache | None:
        if not self.has_cache:
            return None
        cache = self.model.make_cache(width)
        cache.reserve(slots * self.repeats)
        if self.fused is not None:
            self.fused.prepare(cache, slots * self.repeats)
        return cache

    def covers(self, window: Window) -> bool:
        return self.fused is not None and self.fused.covers(window)

    def forget(self, state: CanvasCache | None, slot: int, final_length: int, column: int, block_length: int) -> int:
        if state is None:
            return 0
        for run in range(self.repeats):
            kept = state.forget(slot + run * self.slots_of(state), final_length, column, block_length)
        return kept

    def share(
        self, state: CanvasCache | None, source: int, target: int, final_length: int, column: int, block_length: int
    ) -> int:
        return 0 if state is None else state.share(source, target, final_length, column, block_length)

    def slots_of(self, state: CanvasCache) -> int:
        return state.layers[0].slots // self.repeats

    def __call__(
        self, tokens: torch.Tensor, window: Window, state: CanvasCache | None, masked: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`masked`: `(rows, window)`, the tokens with the prompt's masked, where there is guidance."""
        if self.cfg_scale:
            slots = 0 if state is None else self.slots_of(state)
            tokens, window = torch.cat([tokens, masked]), window.repeated(2, slots)
        if self.covers(window):
            is_step = window.block.shape[1] and not window.is_canvas
            logits = (self.fused_step if is_step else self.fused)(tokens, window, state)
        else:
            logits = self._forward(tokens, window, state)
        return guide(logits, self.cfg_scale) if self.cfg_scale else logits

    def _forward(self, tokens: torch.Tensor, window: Window, state: CanvasCache | None) -> torch.Tensor:
        if state is not None:
            state.set_window(window)
        # FlashAttention takes padded queries to be the last ones of their keys, and knows no other masks.
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

    def _mask(self, window: Window, state: CanvasCache | None) -> torch.Tensor | None:
        """What the tokens of a window see, as the model takes it: nothing to say, `(rows, keys)`, or a made mask."""
        lengths = window.lengths
        if not self.model.makes_masks:  # it knows its blocks, and needs to know of padding where it has no cache
            if state is not None or window.seen == "all":
                return None
            lengths = lengths.amax(-1, keepdim=True)
        elif self.sees_earlier_blocks and (window.seen == "token" or state is None):
            # Only shape, dtype and device of the embeddings are read.
            like = torch.empty(*window.columns.shape, 1, dtype=self.model.dtype, device=self.device)
            sees = lambda row, head, query, key: key < lengths[row, query]
            return create_bidirectional_mask(
                self.model.config, like, None, past_key_values=state, and_mask_function=sees
            )
        elif window.seen == "all":
            return None
        return torch.arange(window.visible, device=self.device) < lengths[:, :1]
