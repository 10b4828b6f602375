"""SDAR-MoE: SDAR's attention with Qwen3-MoE's router and experts."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel, Qwen3MoePreTrainedModel

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..mixture_of_experts import BalancedExpertsLM, InheritedExperts
from ..modeling import attend_both_ways
from .configuration_sdar_moe import SDARMoeConfig

# On disk each expert has its own weights; the library's grouped forward needs them stacked.
register_checkpoint_conversion_mapping("sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)


class SDARMoePreTrainedModel(InheritedExperts, Qwen3MoePreTrainedModel):
    config: SDARMoeConfig


class SDARMoeModel(BlockCausalModel, SDARMoePreTrainedModel, Qwen3MoeModel):
    """The stack of layers without the head."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__(config)
        attend_both_ways(self)


class SDARMoeForCausalLM(BalancedExpertsLM, BlockDiffusionLM, SDARMoePreTrainedModel):
    """SDAR-MoE with its head (Cheng et al., arXiv:2510.06303, https://github.com/JetAstra/SDAR)."""

    base_model_class = SDARMoeModel
