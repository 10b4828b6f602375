"""Block diffusion: attention that is causal from block to block and has no direction inside a block, and its training."""

from contextlib import nullcontext

import torch
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .generation.attention import uses_flash_attention, without_flash_attention
from .modeling import MaskedDiffusionLM, check_labels, counted_positions, sample_ids, text_positions
from .training.losses import masked_diffusion_loss


class BlockCausalModel:
    """Block-causal attention for a stack of the library's layers. Goes before it in a class's bases."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        block_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """
        Args:
            attention_mask: `(batch, keys)`, 0 on padding, or a mask made elsewhere, `(batch, 1, length, keys)`, which
                then says alone what is seen.
            position_ids: `(batch, length)`; several samples packed into a row each start from 0.
            block_size: `config.block_size` if not given.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        is_made = attention_mask is not None and len(attention_mask.shape) == 4
        # With a `CanvasCache` the decoding loop makes the masks, where any is needed.
        needs_blocks = not (is_made or hasattr(past_key_values, "set_window"))
        unfit = uses_flash_attention(self.config) and (needs_blocks or is_made)
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
    """Forward pass and decoding contract of the block-diffusion models."""

    block_grid = "zero"
    sees_earlier_blocks = True
    cache_policies = ("block", "none")

    def __init__(self, config):
        super().__init__(config)
        # The library takes it from the class's name; `Trainer` would not count the labels of the first column.
        self.loss_type = None

    @property
    def default_block_length(self) -> int:
        return self.config.block_size

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_ratio: torch.FloatTensor | None = None,
        block_size: int | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | tuple:
        """As [`MaskedDiffusionLM.forward`]; `block_size` is `config.block_size` if not given.

        With `labels` the loss is that of block diffusion (Arriola et al., arXiv:2503.09573): each noisy block sees
        itself and the clean blocks before it, all blocks in one pass over the noisy and the clean sequence. The clean
        one is `input_ids` with the labels in the places of the masks. `logits` are those of the noisy sequence.
        """
        if labels is None:
            return super().forward(
                input_ids,
                attention_mask,
                position_ids,
                inputs_embeds=inputs_embeds,
                mask_ratio=mask_ratio,
                block_size=block_size,
                return_dict=return_dict,
                **kwargs,
            )
        check_labels(input_ids, inputs_embeds, labels)
        if attention_mask is not None and len(attention_mask.shape) != 2:
            raise ValueError("`attention_mask` must be `(batch, length)` together with `labels`.")
        batch, length = input_ids.shape
        options = {"use_cache": False, "return_dict": True, **kwargs}
        if position_ids is None and length <= checked_block_size(self.config, block_size):
            # One block has no clean block before it to see.
            output = super().forward(input_ids, attention_mask, block_size=block_size, **options)
        else:
            if position_ids is None:
                position_ids = text_positions(input_ids, attention_mask)
            position_ids = position_ids.expand(batch, -1)
            clean = torch.where(labels == -100, input_ids, labels)
            both = torch.cat([input_ids, clean], dim=1)
            twice = None if attention_mask is None else torch.cat([attention_mask, attention_mask], dim=1)
            # Only shape, dtype and device of the embeddings are read.
            shaped_like = torch.empty(batch, 2 * length, 1, dtype=self.dtype, device=input_ids.device)
            # FlashAttention would get no mask at all. (With gradients it is refused by the stack.)
            unfit = uses_flash_attention(self.config) and not torch.is_grad_enabled()
            with without_flash_attention(self.config) if unfit else nullcontext():
                output = super().forward(
                    both,
                    block_diffusion_mask(self.config, shaped_like, twice, position_ids, block_size),
                    torch.cat([position_ids, position_ids], dim=1),
                    token_mask=twice,
                    logits_to_keep=torch.arange(length, device=input_ids.device),
                    **options,
                )
        self._expect_noise(input_ids, labels, mask_ratio)
        loss = masked_diffusion_loss(
            output.logits, labels, self.logits_shift, mask_ratio, attention_mask, num_items_in_batch, position_ids
        )
        if output.get("aux_loss") is not None:
            loss = loss + self.config.router_aux_loss_coef * output.aux_loss
        output = type(output)(**{**output, "loss": loss})
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def block_causal_mask(config, inputs_embeds, attention_mask, position_ids, past_key_values, block_size: int | None):
    """The mask of the back end in use under which a token sees its own block and every earlier one.

    A key's position is its index in the cache without the padding before it; without a cache, keys stand where the
    queries do, and samples packed into one row do not see each other.
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

    return create_bidirectional_mask(
        config, inputs_embeds, attention_mask, past_key_values=past_key_values, and_mask_function=sees
    )


def block_diffusion_mask(config, inputs_embeds, attention_mask, position_ids, block_size: int | None):
    """The three-part mask of block diffusion over a noisy sequence followed by the clean one: a noisy block sees
    itself and the clean blocks before it, a clean block the clean ones up to itself (arXiv:2503.09573, section 3.3).

    Args:
        inputs_embeds: `(batch, 2 * length, ...)`, for shape, dtype and device.
        attention_mask: `(batch, 2 * length)`, 0 on padding, or None.
        position_ids: `(batch, length)`.
    """
    block_size = checked_block_size(config, block_size)
    length = position_ids.shape[1]
    blocks = (position_ids // block_size).repeat(1, 2)
    samples = sample_ids(position_ids).repeat(1, 2)
    # 0 noisy, 1 clean. As numbers: flex attention's compiler cannot compare two comparisons.
    halves = torch.arange(2, device=position_ids.device).repeat_interleave(length)

    def sees(batch_index, head_index, query_index, key_index):
        query_block, key_block = blocks[batch_index, query_index], blocks[batch_index, key_index]
        query_half, key_half = halves[query_index], halves[key_index]
        own = (query_block == key_block) & (query_half == key_half)
        earlier = (key_block < query_block) & (key_half == 1)
        return (own | earlier) & (samples[batch_index, query_index] == samples[batch_index, key_index])

    return create_bidirectional_mask(config, inputs_embeds, attention_mask, and_mask_function=sees)


def checked_block_size(config: PreTrainedConfig, block_size: int | None) -> int:
    size = config.block_size if block_size is None else block_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"`block_size` must be an integer of at least 1, but is {size!r}.")
    return size
