"""`DreamEdge`: a forward pass that gives logits and a static cache, as an exported program has them."""

from typing import Any

import torch
from torch import nn

# Columns of a new cache, unless the model has fewer positions.
CACHE_COLUMNS = 2048


class StaticCache:
    """Keys and values of columns, allocated once and written by position.

    Args:
        keys, values: of each layer, `(rows, kv_heads, columns, head_dim)`.

    Attributes:
        columns: `(rows, window)`, those that the next pass writes.
        filled: the number of columns that passes have written, from column 0 on.
    """

    is_compileable = True  # `update` gives all columns, whatever the pass feeds

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]):
        self.keys, self.values, self.filled = keys, values, 0
        self.columns: Any = None

    @classmethod
    def for_model(cls, model: Any, rows: int, columns: int) -> "StaticCache":
        """An empty cache for a model of this package."""
        attention = model.model.layers[0].self_attn
        shape = (rows, attention.k_proj.out_features // attention.head_dim, columns, attention.head_dim)
        zeros = lambda: [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.model.layers]
        return cls(zeros(), zeros())

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """What the attention layers call: write the window's columns in place, and give all of them."""
        index = self.columns[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, index, keys)
        self.values[layer].scatter_(2, index, values)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class DreamEdge(nn.Module):
    """A model of this package, LLaDA, Dream or SDAR, whose forward pass gives `(logits, past_key_values)`.

    Args:
        model: holds the weights; nothing is copied.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: StaticCache | None = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, StaticCache | None]:
        """
        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, keys)`, 0 on padding, or `(batch, 1, length, keys)`, bool or added to the scores, which
                is used as it is. With a cache the keys are its columns from 0 on.
            position_ids: `(batch, length)` or `(1, length)`; with a cache also the columns to write. By default the text
                goes on where the last pass ended; without a cache and with a 2-D mask, tokens are counted without padding.
            past_key_values: the cache that an earlier pass returned.
            use_cache: whether to write a cache, a new one if none is given.

        Returns:
            Logits, `(batch, length, vocab)`, as the head gives them: those of Dream stand one position earlier than the
            token that they predict. And the cache, or None.

        Raises:
            ValueError: the text does not fit into the cache.
        """
        if not use_cache:
            if past_key_values is not None:
                raise ValueError("`past_key_values` is read and written in one: pass `use_cache=True` with it.")
            inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
            return self.model(input_ids=input_ids, **inputs).logits, None
        batch, length = input_ids.shape
        cache = past_key_values
        if cache is None:
            columns = min(self.config.max_position_embeddings, CACHE_COLUMNS)
            cache = StaticCache.for_model(self.model, batch, columns)
        if position_ids is None:
            position_ids = torch.arange(cache.filled, cache.filled + length, device=input_ids.device)[None]
        position_ids = position_ids.expand(batch, -1)
        rows, _, columns, _ = cache.keys[0].shape
        needed = int(position_ids.max()) + 1
        if rows != batch or needed > columns:
            raise ValueError(
                f"`past_key_values` has {rows} rows of {columns} columns, and {batch} rows of {needed} are needed: pass one "
                "made by `StaticCache.for_model(model.model, rows, columns)`."
            )
        cache.columns, cache.filled = position_ids, max(cache.filled, needed)
        mask = self._mask(attention_mask, position_ids, cache.filled, columns)
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, cache

    def _mask(self, given: torch.Tensor | None, positions: torch.Tensor, filled: int, columns: int) -> torch.Tensor:
        """`(batch, 1, length, columns)`: what the tokens at `positions` see of a cache of which `filled` columns are."""
        if given is not None and given.ndim == 4:
            hidden: Any = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
            return nn.functional.pad(given, (0, columns - given.shape[-1]), value=hidden)
        every = torch.arange(columns, device=positions.device)
        sees = (every < filled).expand(len(positions), 1, positions.shape[1], -1)
        if self.model.sees_earlier_blocks:
            size = self.config.block_size
            sees = sees & (every // size <= (positions // size)[:, None, :, None])
        if given is not None:
            given = nn.functional.pad(given, (0, columns - given.shape[-1])).bool()
            sees = sees & given[:, None, None]
        return sees
