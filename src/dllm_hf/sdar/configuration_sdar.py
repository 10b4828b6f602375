"""SDAR model configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config


@strict
class SDARConfig(Qwen3Config):
    """Configuration of SDAR (Cheng et al., arXiv:2510.06303): a Qwen3's, the block and the mask.

    The published `config.json`s name neither `block_size` nor `mask_token_id`: these are the values they mean.
    """

    model_type = "sdar"
    default_theta = 1000000.0
    # Read by the library's mask functions: inside a block attention has no direction.
    is_causal: ClassVar[bool] = False

    block_size: int = 4
    mask_token_id: int | None = 151669
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def validate_architecture(self):
        """Called by the library after construction."""
        check_block_model(self)


def check_block_model(config) -> None:
    """Raises a `ValueError` where a configuration asks for what block diffusion cannot do."""
    if config.block_size < 1:
        raise ValueError(f"`block_size={config.block_size}` must be at least 1.")
    if config.use_sliding_window:
        raise ValueError("`use_sliding_window=True` is not supported: a block sees every earlier block.")
