"""GLADream: block diffusion on gated linear attention."""

from .configuration_gla_dream import GLADreamConfig
from .generation_utils_gla_dream import GLADreamCache
from .modeling_gla_dream import GLADreamBaseModel, GLADreamModel, GLADreamPreTrainedModel
from .tokenization_gla_dream import GLADreamTokenizer

__all__ = [
    "GLADreamBaseModel",
    "GLADreamCache",
    "GLADreamConfig",
    "GLADreamModel",
    "GLADreamPreTrainedModel",
    "GLADreamTokenizer",
]
