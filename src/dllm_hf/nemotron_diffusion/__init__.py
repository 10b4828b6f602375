"""Nemotron-Labs-Diffusion (https://huggingface.co/nvidia/Nemotron-Labs-Diffusion-8B)."""

from .configuration_nemotron_diffusion import NemotronLabsDiffusionConfig
from .modeling_nemotron_diffusion import (
    NemotronLabsDiffusionEncoder,
    NemotronLabsDiffusionModel,
    NemotronLabsDiffusionPreTrainedModel,
)

__all__ = [
    "NemotronLabsDiffusionConfig",
    "NemotronLabsDiffusionEncoder",
    "NemotronLabsDiffusionModel",
    "NemotronLabsDiffusionPreTrainedModel",
]
