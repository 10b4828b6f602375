"""LLaDA2: a GLM-4-MoE, with norms of queries and keys, whose attention is causal between blocks alone."""

from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE, Glm4MoeModel, Glm4MoePreTrainedModel

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..mixture_of_experts import InheritedExperts
from ..modeling import attend_both_ways
from .configuration_llada2 import LLaDA2MoeConfig


class SplitHeads(ConversionOps):
    """The fused projection of queries, keys and values, `(heads + 2 * kv_heads) * head_dim` rows, as three tensors. The
    library's own `Split` is missing before transformers 5.23, and leaves all three in one storage."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], config: Any, **kwargs
    ) -> dict[str, torch.Tensor]:
        [tensor] = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = tensor.split([number * config.head_dim for number in heads])
        return {name: part.clone() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


_NAMES = {
    r"(^|model\.)word_embeddings\.": r"\1embed_tokens.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}
_projections = [f".self_attn.{name}_proj.weight" for name in "qkv"]
register_checkpoint_conversion_mapping(
    "llada2_moe",
    [
        *(WeightRenaming(original, ours) for original, ours in _NAMES.items()),
        WeightConverter(".attention.query_key_value.weight", _projections, [SplitHeads()]),
        *(get_checkpoint_conversion_mapping("qwen2_moe") or []),
    ],
    overwrite=True,
)


class LLaDA2MoePreTrainedModel(InheritedExperts, Glm4MoePreTrainedModel):
    config: LLaDA2MoeConfig
    _keys_to_ignore_on_load_unexpected = None  # those of GLM are layers that LLaDA2 may have


class LLaDA2MoeModel(BlockCausalModel, LLaDA2MoePreTrainedModel, Glm4MoeModel):
    """The stack of layers without the head."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)  # type: ignore[arg-type]  # it reads fields that ours has under other names
        for layer in self.layers:
            if isinstance(layer.mlp, Glm4MoeMoE):
                layer.mlp.gate.norm_topk_prob = True  # the original divides by the sum whatever the configuration says
        attend_both_ways(self)


class LLaDA2MoeModelLM(BlockDiffusionLM, LLaDA2MoePreTrainedModel):
    """LLaDA2.0 (Bie et al., arXiv:2512.15745) and 2.1 (arXiv:2602.08676), with their head:
    https://github.com/inclusionAI/LLaDA2.X."""

    base_model_class = LLaDA2MoeModel
    quota_source = "block"
    supports_editing = True
