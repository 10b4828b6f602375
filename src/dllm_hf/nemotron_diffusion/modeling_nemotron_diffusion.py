"""Nemotron-Labs-Diffusion: a Ministral 3 whose clean text is causal, and whose block attends both ways."""

import torch
from transformers import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model, Ministral3PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..modeling import attend_both_ways
from ..training.losses import masked_diffusion_loss, previous_tokens
from .configuration_nemotron_diffusion import NemotronLabsDiffusionConfig

# The names on disk. The stack alone has its weights without `encoder.`.
register_checkpoint_conversion_mapping(
    "nemotron_labs_diffusion",
    [WeightRenaming(r"^encoder\.", "model."), WeightRenaming(r"^diffusion_head\.", "lm_head.")],
    overwrite=True,
)


class NemotronLabsDiffusionPreTrainedModel(Ministral3PreTrainedModel):
    config: NemotronLabsDiffusionConfig


class NemotronLabsDiffusionEncoder(BlockCausalModel, NemotronLabsDiffusionPreTrainedModel, Ministral3Model):
    """The stack of layers without the head."""

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__(config)
        attend_both_ways(self)

    def forward(  # type: ignore[override]  # a clean text has no blocks
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_causal_mask: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """
        Args:
            attention_mask: `(batch, keys)`, 0 on padding, or `(batch, 1, length, keys)`, used as it is.
            use_causal_mask: whether a token sees those before it alone, as in a pass over clean text; by default every token
                sees every other.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if use_causal_mask or (attention_mask is not None and len(attention_mask.shape) == 4):
            return super().forward(block_size=1, **inputs)
        return super(BlockCausalModel, self).forward(**inputs)


class NemotronLabsDiffusionModel(BlockDiffusionLM, NemotronLabsDiffusionPreTrainedModel):
    """Nemotron-Labs-Diffusion with its head (https://huggingface.co/nvidia/Nemotron-Labs-Diffusion-8B). `forward` also takes
    `use_causal_mask`, see [`NemotronLabsDiffusionEncoder`].

    With `labels` one pass reads the noisy text and the clean one behind it, which is causal. The loss is that of diffusion, and
    that of the next token, which needs no noise: the mean over all labelled positions, which with the collator's schedule `llada`
    are all that may be masked.
    """

    base_model_class = NemotronLabsDiffusionEncoder
    block_grid = "prompt"
    seeds_blocks = True
    causal_context = True
    default_remasking_strategy = "low_confidence_dynamic"

    def _forward_with_loss(
        self, input_ids, attention_mask, position_ids, labels, mask_ratio, num_items_in_batch, *, token_mask, **inputs
    ) -> ModelOutput:
        output = self.predict_noisy(input_ids, attention_mask, labels, position_ids, token_mask=token_mask, **inputs)
        self._warn_of_clean_text(input_ids, labels, mask_ratio)
        others = (token_mask, num_items_in_batch, position_ids)
        noisy, clean = output["logits"].chunk(2, dim=1)
        before = previous_tokens(labels, position_ids, token_mask)
        is_first = before == torch.arange(labels.shape[1], device=labels.device)  # nothing predicts it
        of_diffusion = masked_diffusion_loss(noisy, labels, 0, mask_ratio, *others)
        of_next_token = masked_diffusion_loss(clean, labels.masked_fill(is_first, -100), 1, None, *others)
        config = self.config
        weight = 0.3 if config.dlm_loss_weight is None else config.dlm_loss_weight
        loss = weight * of_diffusion + config.ar_loss_weight * of_next_token
        return type(output)(**{**output, "logits": noisy, "loss": loss})
