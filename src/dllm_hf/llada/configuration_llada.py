"""LLaDA model configuration, in the names of the published checkpoints."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ..configuration import DiffusionConfigMixin
from ..llada_moe.configuration_llada_moe import LLaDAMoEConfig, is_moe

# Options of the OLMo code base that LLaDA is derived from, and the only value that published checkpoints use.
_FIXED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


@strict
class LLaDAConfig(DiffusionConfigMixin, PreTrainedConfig):
    """Configuration of LLaDA (Nie et al., arXiv:2502.09992). The defaults are those of LLaDA-8B.

    On disk the fields keep the original names; the library's (`hidden_size`, `num_attention_heads`, ...) are aliases.
    """

    model_type = "llada"
    ar_model_types = ("llama", "qwen2")
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = LlamaConfig.base_model_tp_plan
    base_model_pp_plan = LlamaConfig.base_model_pp_plan
    default_theta = 500000.0
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
        "mlp_bias": "include_bias",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int | float = 3
    max_sequence_length: int = 4096
    activation_type: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict | None = None
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    multi_query_attention: bool | None = None
    attention_dropout: float | int = 0.0
    init_std: float = 0.02
    use_cache: bool = False
    mask_token_id: int | None = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    bos_token_id: int | None = None
    eot_token_id: int | None = None

    def _complete(self, kwargs: dict[str, Any]) -> None:
        if is_moe({**kwargs, "architectures": self.architectures}):
            raise ValueError(
                "This is a LLaDA-MoE configuration. It carries LLaDA's `model_type: llada`, but it is another "
                "architecture: make it with `LLaDAMoEConfig`, or read it with `LLaDAConfig.from_dict`."
            )
        if any("ILLaDA" in str(name) for name in self.architectures or []):
            raise ValueError(
                "This is an iLLaDA, of other layers and names than LLaDA's, which dllm_hf does not have: load it with its own "
                "code (`trust_remote_code=True` in a process without `import dllm_hf`)."
            )
        for name, value in _FIXED.items():
            if kwargs.get(name, value) not in (value, None):
                raise ValueError(f"LLaDA checkpoints with `{name}={kwargs[name]!r}` are not supported, only {value!r}.")
        # The original allows more rows in the embedding than tokens; the library has one number for both.
        if self.embedding_size is not None:
            self.vocab_size = self.embedding_size
        self.embedding_size = None
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        for name, multiple in (("n_heads", self.d_model), ("n_kv_heads", self.n_heads)):
            if getattr(self, name) < 1 or multiple % getattr(self, name):
                raise ValueError(f"`{name}={getattr(self, name)}` must divide {multiple}: correct the configuration.")
        if self.eot_token_id is None and self.vocab_size == LLaDAConfig.vocab_size:
            # <|eot_id|>, which the published config.json does not name.
            self.eot_token_id = 126348

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """A [`LLaDAMoEConfig`] for the configuration of a LLaDA-MoE, which carries the same `model_type`."""
        if is_moe(config_dict):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _taken_over(cls, config: PreTrainedConfig) -> dict[str, Any]:
        # One field is about all biases, so that a Llama with some gets the others as zeros.
        include_bias = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
        return {
            **super()._taken_over(config),
            "include_bias": include_bias,
            "include_qkv_bias": config.model_type == "qwen2",
        }

    @property
    def attention_bias(self) -> bool:
        return self.include_bias or self.include_qkv_bias

    def to_dict(self) -> dict[str, Any]:
        """With `embedding_size`, which the original code reads."""
        return {**super().to_dict(), "embedding_size": self.vocab_size}
