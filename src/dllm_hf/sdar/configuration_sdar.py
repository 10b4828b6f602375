"""SDAR model configuration."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from ..configuration import BlockDiffusionConfigMixin


@strict
class SDARConfig(BlockDiffusionConfigMixin, Qwen3Config):
    """Configuration of SDAR (Cheng et al., arXiv:2510.06303): a Qwen3's, the block and the mask.

    The published `config.json` files lack `block_size` and `mask_token_id`: the defaults are their values.
    """

    model_type = "sdar"
    default_theta = 1000000.0

    block_size: int = 4
    mask_token_id: int | None = 151669
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
