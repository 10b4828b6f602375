"""SDAR: a Qwen3 whose attention is causal between blocks and bidirectional inside a block."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel
from transformers.utils import ModelOutput

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..generation.contract import StepForward
from ..modeling import attend_both_ways
from .configuration_sdar import SDARConfig
from .identity_norms import check_projections, drop_norms


class SDARPreTrainedModel(Qwen3PreTrainedModel):
    config: SDARConfig


class SDARModel(BlockCausalModel, SDARPreTrainedModel, Qwen3Model):
    """The stack of layers without the head."""

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        attend_both_ways(self)


class SDARForCausalLM(BlockDiffusionLM, SDARPreTrainedModel):
    """SDAR with its head (Cheng et al., arXiv:2510.06303, https://github.com/JetAstra/SDAR)."""

    base_model_class = SDARModel
    model: SDARModel

    @property
    def logits_shift(self) -> int:  # type: ignore[override]  # of other families a constant of the class
        return self.config.logits_shift

    @property
    def seeds_blocks(self) -> bool:  # type: ignore[override]  # as above
        return bool(self.config.logits_shift)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As the library's. Raises a `ValueError` where the weights were read into numbers that are too coarse for them."""
        found: Any = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model.check_weights()
        return found

    def check_weights(self) -> None:
        """Raises a `ValueError` where the weights before norms that change nothing are lost, in float16 or in zeros of 8 bits."""
        for name, module in self.named_modules() if self.config.has_identity_norms else ():
            if hasattr(module, "q_norm"):
                check_projections(name, module)

    def step_forward(self) -> StepForward | None:
        """See [`DenoisingModel.step_forward`]."""
        self.check_weights()
        return super().step_forward()

    def drop_identity_norms(self) -> None:
        """Make a checkpoint with `config.has_identity_norms` trainable: its norms of queries and keys become `nn.Identity`, and
        its projections, 2^-24 times as large on disk, get their usual size. Saving writes them as they were. A model from
        `from_ar_pretrained` is like this already."""
        if not self.config.has_identity_norms:
            raise ValueError(
                "The norms of queries and keys are no identity (`config.has_identity_norms` is False): train them as they are."
            )
        state = self.state_dict()
        self._drop_norms()
        self.load_state_dict(state)

    def _copy_parameters(self, ar_model: PreTrainedModel) -> dict[str, list[str]]:
        info = super()._copy_parameters(ar_model)
        if self.config.has_identity_norms:
            self._drop_norms()
        return info

    def _has_norms(self) -> bool:
        layers: Any = self.model.layers
        return not isinstance(layers[0].self_attn.q_norm, nn.Identity)

    def _drop_norms(self) -> None:
        layers: Any = self.model.layers
        for layer in layers if self._has_norms() else ():
            drop_norms(layer.self_attn)

    def _denoised_columns(self, position_ids: torch.Tensor, block_size: int) -> torch.Tensor:
        length = position_ids.shape[1]
        columns = torch.arange(length, device=position_ids.device).expand_as(position_ids)
        if not self.logits_shift:
            return columns
        # The last token of a block predicts the first one of the next, as in decoding, from its block when clean.
        return torch.where(position_ids % block_size == block_size - 1, columns + length, columns)

    def _forward_with_loss(self, *args, **kwargs) -> ModelOutput:
        if self.config.has_identity_norms and self._has_norms() and torch.is_grad_enabled():
            raise ValueError(
                "The norms of queries and keys are written so that they change nothing, and the projections before them are too "
                "small to be trained: call `model.drop_identity_norms()` first."
            )
        return super()._forward_with_loss(*args, **kwargs)
