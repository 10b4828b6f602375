"""SDAR and SDAR-MoE (Cheng et al., arXiv:2510.06303)."""

from .configuration_sdar import SDARConfig
from .configuration_sdar_moe import SDARMoeConfig
from .modeling_sdar import SDARForCausalLM, SDARModel, SDARPreTrainedModel
from .modeling_sdar_moe import SDARMoeForCausalLM, SDARMoeModel, SDARMoePreTrainedModel

__all__ = [
    "SDARConfig",
    "SDARForCausalLM",
    "SDARModel",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "SDARMoeModel",
    "SDARMoePreTrainedModel",
    "SDARPreTrainedModel",
]
