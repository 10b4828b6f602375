"""SDAR model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from ..configuration import DiffusionConfigMixin


class BlockDiffusionConfigMixin(DiffusionConfigMixin):
    """Base of SDAR's configurations. Goes before the library's in a class's bases."""

    def _complete(self, kwargs: dict[str, Any]) -> None:
        if self.use_sliding_window:
            raise ValueError("`use_sliding_window=True` is not supported: a block sees every earlier block.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # Published files name the attention of their training, which the library would use for decoding, too. That of the
        # caller is in `kwargs`.
        config_dict = {name: value for name, value in config_dict.items() if name != "attn_implementation"}
        return super().from_dict(config_dict, **kwargs)


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
