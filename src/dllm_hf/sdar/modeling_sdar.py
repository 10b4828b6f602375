"""SDAR: a Qwen3 whose attention is causal from block to block and has no direction inside a block."""

from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..generation.mixin import DiffusionGenerationMixin
from ..modeling import attend_both_ways
from .configuration_sdar import SDARConfig


class SDARPreTrainedModel(Qwen3PreTrainedModel):
    config: SDARConfig
    config_class = SDARConfig


class SDARModel(BlockCausalModel, SDARPreTrainedModel, Qwen3Model):
    """The stack of layers without the head."""

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        attend_both_ways(self)


class SDARForCausalLM(BlockDiffusionLM, DiffusionGenerationMixin, SDARPreTrainedModel):
    """SDAR with its head (Cheng et al., arXiv:2510.06303, https://github.com/JetAstra/SDAR)."""

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
