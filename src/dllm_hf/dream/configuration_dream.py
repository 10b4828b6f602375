"""Dream model configuration."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from ..configuration import DiffusionConfigMixin


@strict
class DreamConfig(DiffusionConfigMixin, Qwen2Config):
    """Configuration of Dream (Ye et al., arXiv:2508.15487): a Qwen2's, and the mask. The defaults are Dream-7B's."""

    model_type = "Dream"
    ar_model_types = ("qwen2", "llama")
    default_theta = 1000000.0

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    use_cache: bool = False
    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
