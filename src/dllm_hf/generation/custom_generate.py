"""The denoising loop for masked language models of other origin: `model.generate(custom_generate=...)` of the library."""

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import DiffusionGenerationConfig
from .mixin import DiffusionGenerateOutput, DiffusionGenerationMixin


def generate(
    model: nn.Module, inputs: torch.Tensor | None = None, logits_shift: int = 0, **kwargs
) -> DiffusionGenerateOutput | torch.Tensor:
    """Continue prompts, and fill the masks in them, with any model whose `forward(input_ids, attention_mask)` returns
    `logits` of masked positions and sees both ways.

    Args:
        inputs: `(batch, prompt)`, left-padded.
        logits_shift: 1 where the logits of position i stand at i - 1.
        kwargs: of [`DiffusionGenerationMixin.diffusion_generate`]; `mask_token_id` if the model's configuration has none.

    Returns:
        As [`DiffusionGenerationMixin.diffusion_generate`].
    """
    # `generate` of the library passes on all of its arguments, most of them None.
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("synced_gpus", "use_model_defaults", "trust_remote_code"):
        given.pop(name, None)
    for name in (
        "assistant_model",
        "prefix_allowed_tokens_fn",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
    ):
        if name in given:
            raise ValueError(f"`{name}` does not apply to decoding by diffusion: leave it out.")
    return MaskedModel(model, logits_shift).diffusion_generate(inputs, **given)


class MaskedModel(DiffusionGenerationMixin):
    """Any masked language model as a [`contract.DenoisingModel`]. It keeps no cache."""

    def __init__(self, model: nn.Module, logits_shift: int):
        super().__init__()
        self.model, self.config, self.logits_shift = model, model.config, logits_shift
        self.device = next(model.parameters()).device
        self.generation_config = DiffusionGenerationConfig.from_model_config(model.config)

    def forward(self, input_ids, attention_mask, logits_to_keep, **kwargs) -> CausalLMOutputWithPast:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        logits = self.model(input_ids=input_ids, attention_mask=mask).logits
        return CausalLMOutputWithPast(logits=logits.take_along_dim(logits_to_keep[..., None], dim=1))
