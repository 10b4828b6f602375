"""Fast-dLLM v2 (Wu et al., arXiv:2509.26328)."""

from .configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
from .modeling_fast_dllm_v2 import Fast_dLLM_QwenForCausalLM, Fast_dLLM_QwenModel, Fast_dLLM_QwenPreTrainedModel

__all__ = [
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "Fast_dLLM_QwenModel",
    "Fast_dLLM_QwenPreTrainedModel",
]
