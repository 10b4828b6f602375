"""LLaDA2 model configuration, in the names of the published checkpoints."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Glm4MoeConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ..sdar.configuration_sdar import BlockDiffusionConfigMixin

# Options of the published files, and the only value that checkpoints use.
_FIXED = {
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "score_function": "sigmoid",
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "norm_head": False,
    "norm_softmax": False,
    "num_nextn_predict_layers": 0,
    "output_router_logits": False,  # its experts are balanced by their bias, without a loss
}


@strict
class LLaDA2MoeConfig(BlockDiffusionConfigMixin, PreTrainedConfig):
    """Configuration of LLaDA2.0 and 2.1 (Bie et al., arXiv:2512.15745). The defaults are those of the mini checkpoints.

    On disk the fields keep the original names; the library's (`n_routed_experts`, `n_shared_experts`) are aliases. The
    published `config.json` files lack `block_size`, `mask_token_id` and `eos_token_id`: the defaults are the values that
    their `generate` has.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Without attention: its three projections are one product, of which no process could take its heads as a slice.
    base_model_tp_plan = {
        name: plan for name, plan in Glm4MoeConfig.base_model_tp_plan.items() if ".self_attn." not in name
    }
    base_model_pp_plan = Glm4MoeConfig.base_model_pp_plan
    base_model_ep_plan = Glm4MoeConfig.base_model_ep_plan
    default_theta = 600000.0
    attribute_map = {
        "n_routed_experts": "num_experts",
        "num_local_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: Any = 128  # an integer, or None for hidden size / heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    use_sliding_window: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: float | int = 0.0
    moe_intermediate_size: int = 512
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 1
    routed_scaling_factor: float | int = 2.5
    norm_topk_prob: bool | None = True
    block_size: int = 32
    mask_token_id: int | None = 156895
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None

    # Read by the library's layers.
    attention_bias = False
    use_qk_norm = True

    def _complete(self, kwargs: dict[str, Any]) -> None:
        super()._complete(kwargs)
        if kwargs.get("expert_capacity") is not None:
            raise ValueError(
                f"`expert_capacity={kwargs['expert_capacity']}` is LLaDA2.2's: it routes whole blocks, inserts and deletes "
                "tokens, which dllm_hf does not do. Load LLaDA2.0 or 2.1, or run LLaDA2.2 with its authors' SGLang."
            )
        for name, value in _FIXED.items():
            if kwargs.get(name, value) not in (value, None):
                raise ValueError(f"LLaDA2 with `{name}={kwargs[name]!r}` is not supported, only {value!r}.")
        # Published files name a window that their code ignores; the library's caches and masks would obey it.
        kwargs.pop("sliding_window", None)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._complete_rotation(kwargs)
        self._check_groups()

    def _complete_rotation(self, kwargs: dict[str, Any]) -> None:
        """`partial_rotary_factor`, the rotated part of a head, from itself or from `rotary_dim`, which says the same."""
        rotated, rope = kwargs.pop("rotary_dim", None), kwargs.get("rope_scaling") or self.rope_parameters or {}
        factor = rope.get("partial_rotary_factor", kwargs.pop("partial_rotary_factor", None))
        if factor is None:
            factor = 0.5 if rotated is None else rotated / self.head_dim
        if not 0 < factor <= 1:
            raise ValueError(
                f"`partial_rotary_factor={factor}` must be above 0 and at most 1: correct the configuration."
            )
        if rotated not in (None, int(self.head_dim * factor)):
            raise ValueError(
                f"`rotary_dim={rotated}` is not `partial_rotary_factor={factor}` of `head_dim={self.head_dim}`: correct one "
                "of them."
            )
        kwargs["partial_rotary_factor"] = factor

    def _check_groups(self) -> None:
        experts, groups, best = self.num_experts, self.n_group, self.topk_group
        if experts % groups or experts // groups < 2:
            raise ValueError(f"`n_group={groups}` must divide `num_experts={experts}` into groups of at least 2.")
        if best > groups:
            raise ValueError(f"`topk_group={best}` must be from 1 to `n_group={groups}`.")
        if not 1 <= self.num_experts_per_tok <= experts // groups * best:
            raise ValueError(
                f"`num_experts_per_tok={self.num_experts_per_tok}` must be from 1 to {experts // groups * best}, the experts "
                f"in `topk_group={best}` groups."
            )

    def to_dict(self) -> dict[str, Any]:
        """With the part of a head that is rotated, under the two names that the original code reads."""
        values = super().to_dict()
        values["partial_rotary_factor"] = factor = (self.rope_parameters or {}).get("partial_rotary_factor", 0.5)
        return {**values, "rotary_dim": int(self.head_dim * factor)}
