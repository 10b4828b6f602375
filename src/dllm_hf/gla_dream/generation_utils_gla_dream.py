"""GLADream's cache, which does not grow with the text."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ..generation.cache import CanvasCache, Copy
from ..generation.window import Window
from ..modeling import keep_positions


def is_step(window: Window, block_size: int) -> bool:
    """Whether a window is the block being decoded, alone or after the block that was finished last."""
    return window.keep.shape[1] > 0 and window.columns.shape[1] <= 2 * block_size


class GLADreamCacheLayer(CacheLayerMixin):
    """The state of one layer before the block being decoded, `(slots, heads, key_dim, value_dim)`, float32."""

    is_sliding = False

    def __init__(self, width: int = 0):
        super().__init__()
        self.state: torch.Tensor | None = None
        self.slots = 0  # until `CanvasCache.reserve`

    def lazy_initialization(self, state: torch.Tensor, dtype: torch.dtype) -> None:  # type: ignore[override]  # no keys
        self.state, self.dtype, self.device = state, dtype, state.device
        self.is_initialized = True

    def rows_of(self, window: Window | None) -> torch.Tensor | None:
        """The states of the rows of a window; None before there are any."""
        if self.state is None or window is None or window.is_every_slot:
            return self.state
        return self.state.index_select(0, window.slots)

    def update(self, state: torch.Tensor, dtype: torch.dtype, window: Window | None = None):  # type: ignore[override]
        """Replace the states of the rows of a window. `dtype`: that of the model."""
        slots = None if window is None or window.is_every_slot else window.slots
        rows = len(state) if slots is None else self.slots
        buffer = state.new_zeros(rows, *state.shape[1:]) if self.state is None else self.state
        if slots is None:
            buffer.copy_(state)
        else:
            buffer.index_copy_(0, slots, state)
        if not self.is_initialized:
            self.lazy_initialization(buffer, dtype)

    def widen(self, width: int) -> None:
        """A longer canvas needs no more room."""

    def select(self, rows: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(0, rows.to(self.device))

    def reset(self) -> None:
        self.state, self.is_initialized = None, False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class GLADreamCache(CanvasCache):
    """One state for each layer, whatever the length of the text before it.

    In the decoding loop each window says which of its tokens are final: their blocks move the state on. The block being
    decoded reads the state and does not change it.

    Without the loop, `model(input_ids, past_key_values=cache, use_cache=True)` continues where the last call stopped, and
    all its tokens are final. Whole blocks move the state on; the tokens of an unfinished block wait in `pending` and are
    computed again by the next call.

    Attributes:
        last_hidden: `(slots, hidden)`, the last hidden state of the token before the block being decoded, from which
            the block's first token is predicted where `logits_shift` is 1.
        pending: `(rows, fewer than block_size, hidden)`, embeddings of the unfinished last block.
        state_length: tokens in the states; None where the rows differ, or after a call that failed.
        last_window: the window of the last forward pass; None without the loop.
    """

    layer_class = GLADreamCacheLayer
    layers: list[GLADreamCacheLayer]  # type: ignore[assignment]  # the library's list holds layers of any kind

    def __init__(self, model: Any, width: int = 0):
        super().__init__(model, width)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.last_hidden: torch.Tensor | None = None
        self.pending: torch.Tensor | None = None
        self.state_length: int | None = 0
        self._window: Window | None = None
        self.last_window: Window | None = None

    def allocate(self, config: PreTrainedConfig, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the buffers that a graph reads: zeros, as before the first block. `dtype`: that of the model."""
        shape = (slots, config.num_attention_heads, config.head_k_dim, config.head_v_dim)
        for layer in self.layers:
            if not layer.is_initialized:
                state = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
                layer.lazy_initialization(state, dtype)
        if config.logits_shift and self.last_hidden is None:
            self.last_hidden = torch.zeros(slots, config.hidden_size, dtype=dtype, device=device)

    def set_window(self, window: Window) -> None:
        self._window = window

    def take_window(self) -> Window | None:
        """The window that was set for this forward pass; None without the loop."""
        self.last_window, self._window = self._window, None
        return self.last_window

    def remember(self, tokens: torch.Tensor, final_lengths: list[int], block_length: int) -> None:
        super().remember(tokens, final_lengths, block_length)
        self.state_length = final_lengths[0] if len(set(final_lengths)) == 1 else None

    def restart(self) -> None:
        super().restart()
        for buffer in (*(layer.state for layer in self.layers), self.last_hidden):
            if buffer is not None:
                buffer.zero_()
        self.pending, self.state_length, self._window = None, 0, None

    def resume(self, tokens: torch.Tensor, block_length: int, width: int) -> list[int]:
        final = super().resume(tokens, block_length, width)
        # The states move on from here. If the call fails, it is unknown how far: -1 starts the rows anew.
        self.final_lengths = [-1] * len(final)
        self.state_length = self.pending = None
        return final

    def forget(self, slot: int, final_length: int, column: int, block_length: int) -> int:
        """A state cannot go back in part: a change before `final_length` starts the row anew."""
        if column >= final_length >= 0:
            return final_length
        for layer in self.layers:
            if layer.state is not None:
                layer.state[slot] = 0
        return 0

    def use_arena(self, slots: int, columns: int, device: torch.device) -> None:
        """States have no columns: all slots are of one size."""

    def make_draft_columns(self, number: int) -> None:
        """The states are the same for a block and its drafts, which change none."""

    def share(self, copies: list[Copy]) -> list[int]:
        """A state is that of one column: where it is past the `column` of a copy, nothing of it can be used."""
        lengths = []
        for source, target, final_length, column, block_length in copies:
            usable = final_length <= column
            for tensor in (*(layer.state for layer in self.layers), self.last_hidden) if usable else ():
                if tensor is not None:
                    tensor[target] = tensor[source]
            lengths.append(final_length if usable else self.forget(target, -1, 0, block_length))
        return lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens after which a forward pass without the loop continues."""
        return (self.state_length or 0) + (0 if self.pending is None else self.pending.shape[1])

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("A recurrent state cannot be cropped: start again with a new cache.")

    def keep_last_hidden(self, hidden_states: torch.Tensor, final: torch.Tensor, window: Window | None) -> None:
        """Keep the hidden state of the last of the `final` tokens, `(rows,)`, of each row that has any."""
        fresh = keep_positions(hidden_states, (final - 1).clamp(min=0)[:, None])[:, 0]
        if window is None:
            self.last_hidden = fresh
            return
        if self.last_hidden is None:
            self.last_hidden = fresh.new_zeros(self.layers[0].slots or len(fresh), fresh.shape[1])
        # In place: graphs read this buffer.
        kept = torch.where((final > 0)[:, None], fresh, self.last_hidden[window.slots])
        self.last_hidden.index_copy_(0, window.slots, kept)

    def with_token_before(self, hidden_states: torch.Tensor, window: Window | None) -> torch.Tensor:
        """`(rows, length, hidden)` of a window -> `(rows, 1 + length, hidden)`, preceded by the token before it. At the
        beginning of a text that is the first token again."""
        before = hidden_states[:, :1]
        if self.last_hidden is not None:
            before = self.last_hidden if window is None or window.is_every_slot else self.last_hidden[window.slots]
            before = before[:, None]
        return torch.cat([before.to(hidden_states.dtype), hidden_states], dim=1)

    @property
    def rows(self) -> int | None:
        """Rows that the cache holds; None before the first."""
        for tensor in (self.pending, self.layers[0].state):
            if tensor is not None:
                return len(tensor)
        return None

    def advance(self, tokens: int, pending: torch.Tensor) -> None:
        """Record a forward pass without the loop: `tokens` more are in the states, `pending` ones wait."""
        self.state_length, self.pending = (self.state_length or 0) + tokens, pending
        # The tokens that a conversation remembers are not the whole text any more.
        self.final_lengths = [-1] * len(self.final_lengths)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        for name in ("last_hidden", "pending"):
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, rows.index_select(0, indices.to(rows.device)))
