"""LLaDA-MoE: a Qwen3-MoE with bidirectional attention, LLaDA's decoding, and a router that does not normalise."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from ..mixture_of_experts import BalancedExpertsLM, InheritedExperts
from ..modeling import attend_both_ways
from .configuration_llada_moe import LLaDAMoEConfig

# By the names of the classes, which the library asks for first: the model type is LLaDA's, and so would be the conversion.
for _name in ("LLaDAMoEModelLM", "LLaDAMoEModel"):
    register_checkpoint_conversion_mapping(
        _name,
        [
            WeightRenaming(r"(?<!\.mlp)\.shared_expert\.", ".mlp.shared_expert."),
            WeightRenaming(".mlp.expert_bias", ".mlp.gate.expert_bias"),
            *(get_checkpoint_conversion_mapping("qwen2_moe") or []),
        ],
        overwrite=True,
    )


class LLaDAMoEPreTrainedModel(InheritedExperts, Qwen3MoePreTrainedModel):
    config_class = LLaDAMoEConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLaDAMoETopKRouter):
            init.zeros_(module.expert_bias)


class LLaDAMoETopKRouter(Qwen3MoeTopKRouter):
    """With a bias on the probabilities, by which experts are chosen and weighed."""

    expert_bias: torch.Tensor

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, indices = (logits.softmax(-1, dtype=torch.float) + self.expert_bias).topk(self.top_k, dim=-1)
        return logits, weights.to(logits.dtype), indices


class LLaDAMoESparseMoeBlock(Qwen3MoeSparseMoeBlock):
    """With a shared expert, which on disk belongs to the layer."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)  # type: ignore[arg-type]  # it reads fields that ours has under other names
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=config.shared_expert_intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.shared_expert(hidden_states)


class LLaDAMoEModel(LLaDAMoEPreTrainedModel, Qwen3MoeModel):
    """The stack of layers without the head."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)  # type: ignore[arg-type]
        for layer in self.layers:
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                if config.shared_expert_intermediate_size is not None:
                    layer.mlp = LLaDAMoESparseMoeBlock(config)
                if config.moe_router_enable_expert_bias:
                    layer.mlp.gate = LLaDAMoETopKRouter(config)
                layer.mlp.gate.norm_topk_prob = False  # whatever the configuration says, as in the original
        attend_both_ways(self)


class LLaDAMoEModelLM(BalancedExpertsLM, LLaDAMoEPreTrainedModel):
    """LLaDA-MoE with its head (Zhu et al., arXiv:2509.24389, https://huggingface.co/inclusionAI/LLaDA-MoE-7B-A1B-Base)."""

    base_model_class = LLaDAMoEModel
    cache_policies = ("none", "prefix", "dual")
    default_block_length = 32
    confidence_source = "raw"
