"""Fast-dLLM v2: a Qwen2 whose attention is causal between blocks and bidirectional inside a block."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..modeling import attend_both_ways
from .configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig


class Fast_dLLM_QwenPreTrainedModel(Qwen2PreTrainedModel):
    config: Fast_dLLM_QwenConfig


class Fast_dLLM_QwenModel(BlockCausalModel, Fast_dLLM_QwenPreTrainedModel, Qwen2Model):
    """The stack of layers without the head."""

    def __init__(self, config: Fast_dLLM_QwenConfig):
        super().__init__(config)
        attend_both_ways(self)


class Fast_dLLM_QwenForCausalLM(BlockDiffusionLM, Fast_dLLM_QwenPreTrainedModel):
    """Fast-dLLM v2 with its head (Wu et al., arXiv:2509.26328, https://github.com/NVlabs/Fast-dLLM).

    Its training started from an autoregressive model: position i - 1 predicts position i. A block's first token is that of
    the clean text before it, the others are decoded in sub-blocks.
    """

    base_model_class = Fast_dLLM_QwenModel
    logits_shift = 1
    seeds_blocks = True
    default_small_block_size = 8
    default_remasking_strategy = "low_confidence_dynamic"
