"""LLaDA-MoE (Zhu et al., arXiv:2509.24389)."""

from .configuration_llada_moe import LLaDAMoEConfig
from .modeling_llada_moe import LLaDAMoEModel, LLaDAMoEModelLM, LLaDAMoEPreTrainedModel

__all__ = ["LLaDAMoEConfig", "LLaDAMoEModel", "LLaDAMoEModelLM", "LLaDAMoEPreTrainedModel"]
