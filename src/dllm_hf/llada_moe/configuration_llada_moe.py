"""LLaDA-MoE model configuration, in the names of the published checkpoints."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ..configuration import DiffusionConfigMixin

# Options of the published files, and the only value that checkpoints use.
_FIXED = {
    "clip_qkv": None,
    "qk_layernorm": True,
    "partial_rotary_factor": 1,
    "moe_router_score_function": "softmax",
}


def is_moe(values: dict[str, Any]) -> bool:
    """Whether a configuration with LLaDA's `model_type` is one of LLaDA-MoE, which has the same."""
    names = " ".join(values.get("architectures") or [])
    return "MoE" in names or any(values.get(name) is not None for name in ("num_experts", "expert_intermediate_size"))


@strict
class LLaDAMoEConfig(DiffusionConfigMixin, PreTrainedConfig):
    """Configuration of LLaDA-MoE (Zhu et al., arXiv:2509.24389). The defaults are those of LLaDA-MoE-7B-A1B.

    On disk the fields keep the original names; the library's (`intermediate_size`, `moe_intermediate_size`) are aliases. The
    published `config.json` files lack `mask_token_id`. They carry LLaDA's `model_type`: `LLaDAConfig.from_dict` tells the two
    apart.
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = Qwen3MoeConfig.base_model_tp_plan
    base_model_pp_plan = Qwen3MoeConfig.base_model_pp_plan
    default_theta = 50000.0
    attribute_map = {
        "intermediate_size": "dense_intermediate_size",
        "moe_intermediate_size": "expert_intermediate_size",
        "num_local_experts": "num_experts",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] | None = None
    moe_router_enable_expert_bias: bool = False
    norm_topk_prob: bool | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    mask_token_id: int | None = 156895
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None

    # Read by the library's layers.
    sliding_window = None
    decoder_sparse_step = 1

    def _complete(self, kwargs: dict[str, Any]) -> None:
        for name, value in _FIXED.items():
            if kwargs.get(name, value) not in (value, None):
                raise ValueError(f"LLaDA-MoE with `{name}={kwargs[name]!r}` is not supported, only {value!r}.")
        kwargs.pop("partial_rotary_factor", None)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads={self.num_attention_heads}` must divide {self.hidden_size}: correct the configuration."
            )
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        if len(self.moe_layer_freq) != self.num_hidden_layers or not {*self.moe_layer_freq} <= {0, 1}:
            raise ValueError(
                f"`moe_layer_freq={self.moe_layer_freq}` must say of each of the {self.num_hidden_layers} layers whether it "
                "has experts (1) or not (0)."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok={self.num_experts_per_tok}` must be from 1 to `num_experts={self.num_experts}`."
            )

    @property
    def mlp_only_layers(self) -> list[int]:
        return [index for index, has_experts in enumerate(self.moe_layer_freq or []) if not has_experts]

    def to_dict(self) -> dict[str, Any]:
        """With `partial_rotary_factor`, which the original code reads."""
        return {**super().to_dict(), "partial_rotary_factor": 1}
