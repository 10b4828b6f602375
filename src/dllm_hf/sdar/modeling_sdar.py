"""SDAR: a Qwen3 whose attention is causal between blocks and bidirectional inside a block."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..modeling import attend_both_ways
from .configuration_sdar import SDARConfig


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
