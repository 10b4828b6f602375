"""SDAR model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3Config

from ..configuration import BlockDiffusionConfigMixin


@strict
class SDARConfig(BlockDiffusionConfigMixin, Qwen3Config):
    """Configuration of SDAR (Cheng et al., arXiv:2510.06303): a Qwen3's, the block and the mask.

    The published `config.json` files lack `block_size` and `mask_token_id`: the defaults are their values.

    Args:
        logits_shift: 1 where position i - 1 predicts position i, as in a model started from an autoregressive one. A block's
            first token is then that of the clean text before it, in training and in decoding.
        has_identity_norms: the norms of queries and keys change nothing, as in a model started from one without them
            ([`SDARForCausalLM.drop_identity_norms`]).
    """

    model_type = "sdar"
    ar_model_types = ("qwen3", "qwen2", "llama")
    default_theta = 1000000.0

    block_size: int = 4
    logits_shift: int = 0
    has_identity_norms: bool = False
    mask_token_id: int | None = 151669
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def _complete(self, kwargs: dict[str, Any]) -> None:
        super()._complete(kwargs)
        if self.logits_shift not in (0, 1):
            raise ValueError(f"`logits_shift={self.logits_shift}` must be 0, or 1 after an autoregressive model.")

    @classmethod
    def _taken_over(cls, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            # A Qwen2 always has biases, and its configuration does not say so.
            "attention_bias": getattr(config, "attention_bias", config.model_type == "qwen2"),
            "has_identity_norms": config.model_type != "qwen3",
            "logits_shift": 1,
        }
