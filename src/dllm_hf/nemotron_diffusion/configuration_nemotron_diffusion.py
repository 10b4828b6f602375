"""Nemotron-Labs-Diffusion model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Ministral3Config, PreTrainedConfig

from ..configuration import BlockDiffusionConfigMixin


@strict
class NemotronLabsDiffusionConfig(BlockDiffusionConfigMixin, Ministral3Config):
    """Configuration of Nemotron-Labs-Diffusion: a Ministral 3's, the block, the mask and the weights of the two losses. The
    defaults are those of the 8B model.

    Args:
        dlm_paradigm: `"bidirectional"`, what a pass over a text without a cache sees.
        dlm_loss_weight: of the diffusion loss; null, as in the published files, is 0.3, the weight in the authors' account.
        ar_loss_weight: of the loss of the next token, over the clean text.
    """

    model_type = "nemotron_labs_diffusion"
    ar_model_types = ("ministral3", "llama")
    default_theta = 1000000.0

    block_size: int = 32
    mask_token_id: int | None = 100
    eos_token_id: int | list[int] | None = 11
    dlm_paradigm: str = "bidirectional"
    dlm_loss_weight: float | int | None = None
    ar_loss_weight: float | int = 1.0

    @classmethod
    def _taken_over(cls, config: PreTrainedConfig) -> dict[str, Any]:
        # A Llama is a Ministral 3 whose queries have no scale.
        scale = {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": config.max_position_embeddings}
        return {
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "sliding_window": getattr(config, "sliding_window", None),
            "rope_parameters": {**scale, **config.rope_parameters},
        }

    def _complete(self, kwargs: dict[str, Any]) -> None:
        if (self.rope_parameters or {}).get("rope_type") == "default":
            # The scale of queries reads it, though the embeddings do not.
            ignored = {"original_max_position_embeddings"}
            self.ignore_keys_at_rope_validation = self.ignore_keys_at_rope_validation | ignored
        if self.sliding_window is not None:
            raise ValueError("`sliding_window` is not supported, a block sees every earlier block: leave it out.")
        if self.dlm_paradigm != "bidirectional":
            raise ValueError(
                f"`dlm_paradigm={self.dlm_paradigm!r}` is not supported, only 'bidirectional', that of the published models."
            )
        if not kwargs.get("causal_context", True):
            raise ValueError(
                "`causal_context=False` is not supported: the text before a block is causal, as the published models' recommended "
                "settings say. Leave it out."
            )
        for name in ("attention_bias", "mlp_bias"):
            if kwargs.get(name):
                raise ValueError(f"`{name}=True` is not supported: no layer of the published models has a bias.")

    def _check_attention(self) -> None:
        super()._check_attention()
        for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
            if not isinstance((self.rope_parameters or {}).get(name), (int, float)):
                raise ValueError(
                    f"`rope_parameters` has no number `{name}`, by which queries are scaled: take the published ones, "
                    "or give 0 as `llama_4_scaling_beta` for no scale."
                )
