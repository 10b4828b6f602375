"""GLADream model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from ..configuration import DiffusionConfigMixin
from .gated_linear_attention import check_mode

INJECTION_MODES = ("global", "boundary")


@strict
class GLADreamConfig(DiffusionConfigMixin, PreTrainedConfig):
    """Configuration of GLADream, block diffusion on gated linear attention. The special tokens are Dream's.

    Args:
        block_size: tokens that are denoised together.
        expand_k: width of all keys together, as a multiple of `hidden_size`.
        expand_v: width of all values together, as a multiple of `hidden_size`.
        num_key_value_heads: heads of keys, values and decays; each serves several heads of queries.
        attn_mode: `auto`, `torch`, `naive`, or a kernel of flash-linear-attention: `chunk`, `fused_recurrent`.
        inter_block_injection_mode: how a block receives the state of the blocks before it. `global`: every token reads
            it undecayed. `boundary`: both scans start from it, so that it decays from the block's edges inwards.
        share_inter_intra_gate_weights: one matrix for the gate inside a block and the gate between blocks.
        use_complementary_mask: in training on clean text, mask each block at its own rate and train on the inverted
            mask as well (Fast-dLLM v2, arXiv:2509.26328), instead of one rate per sequence weighted by its inverse.
        logits_shift: 1 where position i - 1 predicts position i, as in a model started from an autoregressive one.
        gate_low_rank_dim: rank of the projection to the decays.
        gate_logit_normalizer: divides the log-decays.
        conv_size: tokens that a short convolution over each channel of queries, keys and values spans, an odd number;
            0 for none.
        attention_bias: biases in the projections to queries, keys and values.
        head_dim: derived; the rotary embedding of the library reads this name.
    """

    model_type = "gla_dream"
    ar_model_types = ("qwen2", "qwen3", "llama")
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10000.0
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    block_size: int = 32
    expand_k: int | float = 1
    expand_v: int | float = 1
    attn_mode: str = "auto"
    inter_block_injection_mode: str = "global"
    share_inter_intra_gate_weights: bool = False
    use_complementary_mask: bool = False
    logits_shift: int = 0
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: int | float = 16
    conv_size: int = 0
    attention_bias: bool = False
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def _complete(self, kwargs: dict[str, Any]) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.logits_shift not in (0, 1):
            raise ValueError(f"`logits_shift={self.logits_shift}` must be 0, or 1 after an autoregressive model.")
        if self.inter_block_injection_mode not in INJECTION_MODES:
            raise ValueError(
                f"`inter_block_injection_mode={self.inter_block_injection_mode!r}` is unknown: "
                f"choose one of {', '.join(INJECTION_MODES)}."
            )
        if self.gate_logit_normalizer <= 0:
            raise ValueError(f"`gate_logit_normalizer={self.gate_logit_normalizer}` must be above 0.")
        if self.conv_size < 0 or (self.conv_size and self.conv_size % 2 == 0):
            raise ValueError(
                f"`conv_size={self.conv_size}` must be an odd number, as many tokens before as after, or 0 for no "
                "convolution."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads={self.num_key_value_heads}` must divide "
                f"`num_attention_heads={self.num_attention_heads}`."
            )
        for name in ("expand_k", "expand_v"):
            width = self.hidden_size * getattr(self, name)
            # Widths that do not divide evenly are given as rounded quotients.
            is_whole = abs(width - round(width)) < 1e-6 * self.hidden_size
            if width <= 0 or not is_whole or round(width) % self.num_attention_heads:
                raise ValueError(
                    f"`num_attention_heads={self.num_attention_heads}` must divide `hidden_size * {name}` = "
                    f"{self.hidden_size} * {getattr(self, name)}: change one of the three."
                )
        if self.head_dim not in (None, self.head_k_dim):
            raise ValueError(
                f"`head_dim={self.head_dim}` is not `hidden_size * expand_k / num_attention_heads` = {self.head_k_dim}: "
                "leave it out, or change `expand_k`."
            )
        if self.head_k_dim % 2:
            raise ValueError(
                f"A head's keys are {self.head_k_dim} wide, and rotary positions turn pairs: make `hidden_size * expand_k / "
                "num_attention_heads` even."
            )
        self.head_dim = self.head_k_dim
        check_mode(self.attn_mode)

    @classmethod
    def _taken_over(cls, config: PreTrainedConfig) -> dict[str, Any]:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = head_dim * config.num_attention_heads / config.hidden_size
        # A Qwen2 always has these biases, and its configuration does not say so.
        bias = getattr(config, "attention_bias", config.model_type == "qwen2")
        return {"expand_k": width, "expand_v": width, "attention_bias": bias, "logits_shift": 1}

    @property
    def head_k_dim(self) -> int:
        """Width of a head's keys."""
        return round(self.hidden_size * self.expand_k) // self.num_attention_heads

    @property
    def head_v_dim(self) -> int:
        """Width of a head's values."""
        return round(self.hidden_size * self.expand_v) // self.num_attention_heads
