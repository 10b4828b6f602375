"""Fast-dLLM v2 model configuration."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from ..configuration import BlockDiffusionConfigMixin


@strict
class Fast_dLLM_QwenConfig(BlockDiffusionConfigMixin, Qwen2Config):
    """Configuration of Fast-dLLM v2 (Wu et al., arXiv:2509.26328): a Qwen2's, the block and the mask.

    The published `config.json` files lack `mask_token_id`: the default is the checkpoints' `|<MASK>|`.
    """

    model_type = "Fast_dLLM_Qwen"
    ar_model_types = ("qwen2", "llama")
    default_theta = 1000000.0

    attribute_map = {"block_size": "bd_size"}

    bd_size: int = 32
    mask_token_id: int | None = 151665
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
