"""SDAR-MoE model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig

from ..configuration import BlockDiffusionConfigMixin


@strict
class SDARMoeConfig(BlockDiffusionConfigMixin, Qwen3MoeConfig):
    """Configuration of SDAR-MoE (Cheng et al., arXiv:2510.06303): a Qwen3-MoE's, the block and the mask."""

    model_type = "sdar_moe"
    default_theta = 1000000.0

    # The inverse of the library's, so that the published name stays on disk.
    attribute_map = {"num_local_experts": "num_experts"}

    head_dim: int | None = 128
    block_size: int = 4
    mask_token_id: int | None = 151669
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def _complete(self, kwargs: dict[str, Any]) -> None:
        super()._complete(kwargs)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok={self.num_experts_per_tok}` must be from 1 to `num_experts={self.num_experts}`."
            )
