"""Decoding for masked-diffusion language models. Knows tokens, blocks and caches; knows no architecture."""

from .cache import CanvasCache
from .configuration import DiffusionGenerationConfig
from .mixin import DiffusionGenerateOutput, DiffusionGenerationMixin
from .remasking import STRATEGIES

__all__ = [
    "STRATEGIES",
    "CanvasCache",
    "DiffusionGenerateOutput",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
]
