"""Block diffusion: attention that is causal between blocks and bidirectional inside a block, and its training."""

from contextlib import nullcontext

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .generation.attention import mask_of_rule, uses_flash_attention, without_flash_attention
from .modeling import MaskedDiffusionLM, counted_positions, sample_ids, text_positions


class BlockCausalModel(PreTrainedModel):
    """Block-causal attention for a stack of the library's layers. Goes before it in a class's bases."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        block_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """
        Args:
            attention_mask: `(batch, keys)`, 0 on padding, or `(batch, 1, length, keys)`, used as it is instead of the
                block-causal mask.
            position_ids: `(batch, length)`; several samples packed into a row each start from 0.
            block_size: `config.block_size` if not given.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        has_mask = attention_mask is not None and len(attention_mask.shape) == 4
        # With a `CanvasCache` the decoding loop makes the masks, where any is needed.
        needs_blocks = not (has_mask or hasattr(past_key_values, "set_window"))
        unfit = uses_flash_attention(self.config) and (needs_blocks or has_mask)
        if unfit and torch.is_grad_enabled():
            raise ValueError(
                "FlashAttention cannot mask blocks: load the model with `attn_implementation='sdpa'` or, on a GPU, "
                "`'flex_attention'` to train it."
            )
        with without_flash_attention(self.config) if unfit else nullcontext():
            if needs_blocks:
                attention_mask = block_causal_mask(
                    self.config, inputs_embeds, attention_mask, position_ids, past_key_values, block_size
                )
            return super().forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )


class BlockDiffusionLM(MaskedDiffusionLM):
    """Forward pass and decoding contract of the block-diffusion models. `forward` also takes `block_size`,
    `config.block_size` if not given.

    With `labels` the loss is that of block diffusion (Arriola et al., arXiv:2503.09573): each noisy block sees itself
    and the clean blocks before it, all blocks in one pass over the noisy and the clean sequence. The clean one is
    `input_ids` with the masked tokens replaced by their labels. `logits` are those of the noisy sequence.
    """

    block_grid = "zero"
    sees_earlier_blocks = True
    cache_policies = ("block", "none")

    @property
    def default_block_length(self) -> int:
        return self.config.block_size

    def predict_noisy(
        self,
        input_ids,
        attention_mask,
        labels,
        position_ids=None,
        *,
        block_size=None,
        block_starts=None,
        logits_to_keep=0,
        token_mask=None,
        **inputs,
    ) -> ModelOutput:
        """See [`MaskedDiffusionLM.predict_noisy`].

        Args:
            block_starts: `(batch, 1)`, where a block of each row begins; by default at 0.
            logits_to_keep: 0, or `(batch, kept)`, positions of the noisy text.
        """
        check_clean_text(input_ids, attention_mask, labels, **inputs)
        inputs["use_cache"] = bool(inputs.get("use_cache"))
        batch, length = input_ids.shape
        is_one_block = length <= checked_block_size(self.config, block_size)
        if position_ids is None and is_one_block and not self.causal_context:
            # One block has no clean block before it to see.
            inputs |= {"token_mask": token_mask, "block_size": block_size, "logits_to_keep": logits_to_keep}
            return self._predict(input_ids, attention_mask, None, **inputs)
        if position_ids is None:
            position_ids = text_positions(input_ids, attention_mask)
        position_ids = position_ids.expand(batch, -1)
        both = torch.cat([input_ids, torch.where(labels == -100, input_ids, labels)], dim=1)
        twice = None if attention_mask is None else attention_mask.repeat(1, 2)
        # Only shape, dtype and device of the embeddings are read.
        shaped_like = torch.empty(batch, 2 * length, 1, dtype=self.dtype, device=input_ids.device)
        # FlashAttention would get no mask at all. (With gradients it is refused by the stack.)
        unfit = uses_flash_attention(self.config) and not torch.is_grad_enabled()
        with without_flash_attention(self.config) if unfit else nullcontext():
            if not torch.is_tensor(logits_to_keep):
                logits_to_keep = self._denoised_columns(position_ids, checked_block_size(self.config, block_size))
            inputs |= {"token_mask": twice, "logits_to_keep": logits_to_keep}
            blocks = (block_size, self.causal_context, block_starts)
            mask = block_diffusion_mask(self.config, shaped_like, twice, position_ids, *blocks)
            return self._predict(both, mask, position_ids.repeat(1, 2), **inputs)

    def _denoised_columns(self, position_ids: torch.Tensor, block_size: int) -> torch.Tensor:
        """Whose logits a loss is of, in the noisy text and the clean one behind it: as `logits_to_keep`."""
        length = position_ids.shape[1]
        # A clean text that sees nothing behind itself is trained as well.
        return torch.arange(2 * length if self.causal_context else length, device=position_ids.device)


def check_clean_text(
    input_ids, attention_mask, labels: torch.Tensor, *, inputs_embeds=None, past_key_values=None, **inputs
) -> None:
    """Raises a `ValueError` for inputs of `forward` with which a loss over noisy and clean text cannot be computed."""
    if input_ids is None or inputs_embeds is not None or labels.shape != input_ids.shape:
        raise ValueError("`labels` needs `input_ids` of the same shape: the clean text is made of both.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError("`attention_mask` must be `(batch, length)` together with `labels`.")
    if past_key_values is not None:
        raise ValueError("`past_key_values` and `labels` exclude each other: training reads the whole text.")


def block_causal_mask(config, inputs_embeds, attention_mask, position_ids, past_key_values, block_size: int | None):
    """A mask for the attention in use: a token sees its own block and every earlier one.

    A key's position is its index in the cache, padding left out; without a cache it is that of the query, and samples
    packed into one row do not see each other.
    """
    block_size = checked_block_size(config, block_size)
    batch, length = inputs_embeds.shape[:2]
    query_positions = position_ids.expand(batch, -1)
    offset = 0
    if past_key_values is None:
        key_positions, samples = query_positions, sample_ids(query_positions)
    else:
        offset = past_key_values.get_seq_length()
        samples = None
        if attention_mask is None:
            keys = past_key_values.get_mask_sizes(length, 0)[0]
            key_positions = torch.arange(keys, device=inputs_embeds.device).expand(batch, -1)
        else:
            key_positions = counted_positions(attention_mask)
    query_blocks, key_blocks = query_positions // block_size, key_positions // block_size

    def sees(batch_index, head_index, query_index, key_index):
        seen = key_blocks[batch_index, key_index] <= query_blocks[batch_index, query_index - offset]
        if samples is not None:
            seen = seen & (samples[batch_index, key_index] == samples[batch_index, query_index])
        return seen

    return mask_of_rule(config, inputs_embeds, attention_mask, sees, past_key_values)


def block_diffusion_mask(
    config,
    inputs_embeds,
    attention_mask,
    position_ids,
    block_size: int | None,
    is_causal: bool = False,
    block_starts: torch.Tensor | None = None,
):
    """The three-part mask of block diffusion over a noisy sequence followed by the clean one: a noisy block sees
    itself and the clean blocks before it, a clean block the clean ones up to itself (arXiv:2503.09573, section 3.3).

    Args:
        inputs_embeds: `(batch, 2 * length, ...)`, for shape, dtype and device.
        attention_mask: `(batch, 2 * length)`, 0 on padding, or None.
        position_ids: `(batch, length)`.
        is_causal: whether a clean token sees the clean ones up to itself alone, not up to the end of its block.
        block_starts: `(batch, 1)`, where a block of each row begins; by default at 0.
    """
    block_size = checked_block_size(config, block_size)
    length = position_ids.shape[1]
    start = 0 if block_starts is None else block_starts
    blocks = ((position_ids - start) // block_size).repeat(1, 2)
    # The last position that a token sees in its own block.
    ends = (blocks + 1) * block_size + start
    if is_causal:
        ends[:, length:] = position_ids
    positions = position_ids.repeat(1, 2)
    samples = sample_ids(position_ids).repeat(1, 2)
    # 0 noisy, 1 clean. Numbers, not booleans: flex attention's compiler cannot compare the results of comparisons.
    halves = torch.arange(2, device=position_ids.device).repeat_interleave(length)

    def sees(batch_index, head_index, query_index, key_index):
        query_block, key_block = blocks[batch_index, query_index], blocks[batch_index, key_index]
        query_half, key_half = halves[query_index], halves[key_index]
        own = (query_block == key_block) & (query_half == key_half)
        # Not in place, which flex attention's compiler cannot.
        own = own & (positions[batch_index, key_index] <= ends[batch_index, query_index])
        earlier = (key_block < query_block) & (key_half == 1)
        return (own | earlier) & (samples[batch_index, query_index] == samples[batch_index, key_index])

    return mask_of_rule(config, inputs_embeds, attention_mask, sees)


def checked_block_size(config: PreTrainedConfig, block_size: int | None) -> int:
    size = config.block_size if block_size is None else block_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"`block_size` must be an integer of at least 1, but is {size!r}.")
    return size
