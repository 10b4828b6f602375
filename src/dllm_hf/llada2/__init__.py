"""LLaDA2.0 and 2.1 (Bie et al., arXiv:2512.15745)."""

from .configuration_llada2 import LLaDA2MoeConfig
from .modeling_llada2 import LLaDA2MoeModel, LLaDA2MoeModelLM, LLaDA2MoePreTrainedModel

__all__ = ["LLaDA2MoeConfig", "LLaDA2MoeModel", "LLaDA2MoeModelLM", "LLaDA2MoePreTrainedModel"]
