"""LLaDA2: a GLM-4-MoE, with norms of queries and keys, whose attention is causal between blocks alone."""

import torch
from torch import nn
from transformers import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeModel,
    Glm4MoeMoE,
    Glm4MoePreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..mixture_of_experts import InheritedExperts
from ..modeling import attend_both_ways
from .configuration_llada2 import LLaDA2MoeConfig

_NAMES = {
    r"(^|model\.)word_embeddings\.": r"\1embed_tokens.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_key_value.": ".self_attn.query_key_value.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}
register_checkpoint_conversion_mapping(
    "llada2_moe",
    [
        *(WeightRenaming(original, ours) for original, ours in _NAMES.items()),
        *(get_checkpoint_conversion_mapping("qwen2_moe") or []),
    ],
    overwrite=True,
)


class LLaDA2MoePreTrainedModel(InheritedExperts, Glm4MoePreTrainedModel):
    config_class = LLaDA2MoeConfig
    _keys_to_ignore_on_load_unexpected = list[str]()  # those of GLM are layers that LLaDA2 may have


class LLaDA2MoeAttention(Glm4MoeAttention):
    """Queries, keys and values are one product. Three would be three tensors made of one on loading, of which quantisers take
    the first, and adapters for the published module would not fit."""

    layer_idx: int

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.sizes = [number * self.head_dim for number in heads]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        products = self.query_key_value(hidden_states).split(self.sizes, dim=-1)
        query, key, value = (product.view(heads) for product in products)
        query, key, value = (each.transpose(1, 2) for each in (self.q_norm(query), self.k_norm(key), value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class LLaDA2MoeModel(BlockCausalModel, LLaDA2MoePreTrainedModel, Glm4MoeModel):
    """The stack of layers without the head."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)  # type: ignore[arg-type]  # it reads fields that ours has under other names
        for index, layer in enumerate(self.layers):
            layer.self_attn = LLaDA2MoeAttention(config, index)
            if isinstance(layer.mlp, Glm4MoeMoE):
                layer.mlp.gate.norm_topk_prob = True  # the original divides by the sum whatever the configuration says
        attend_both_ways(self)


class LLaDA2MoeModelLM(BlockDiffusionLM, LLaDA2MoePreTrainedModel):
    """LLaDA2.0 (Bie et al., arXiv:2512.15745) and 2.1 (arXiv:2602.08676), with their head:
    https://github.com/inclusionAI/LLaDA2.X."""

    base_model_class = LLaDA2MoeModel
    quota_source = "block"
    supports_editing = True
