"""Diffusion language models as native `transformers` models.

Importing this package registers every family with the Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .generation import (
    STRATEGIES,
    CanvasCache,
    DiffusionGenerateOutput,
    DiffusionGenerationConfig,
    DiffusionGenerationMixin,
)
from .gla_dream import GLADreamBaseModel, GLADreamCache, GLADreamConfig, GLADreamModel, GLADreamTokenizer
from .llada import LLaDAConfig, LLaDAModelLM
from .sdar import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

__version__ = "0.1.0"

# One line for each family: configuration, what `AutoModel` gives (as the published repositories have it), what
# `AutoModelForCausalLM` gives, tokenizer.
FAMILIES = (
    (LLaDAConfig, LLaDAModelLM, LLaDAModelLM, PreTrainedTokenizerFast),
    (DreamConfig, DreamModel, DreamModel, DreamTokenizer),
    (SDARConfig, SDARModel, SDARForCausalLM, Qwen2Tokenizer),
    (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM, Qwen2Tokenizer),
    (GLADreamConfig, GLADreamModel, GLADreamModel, GLADreamTokenizer),
)

for _config, _model, _causal_lm, _tokenizer in FAMILIES:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=_tokenizer, exist_ok=True)

__all__ = [
    "FAMILIES",
    "STRATEGIES",
    "CanvasCache",
    "DiffusionGenerateOutput",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "GLADreamBaseModel",
    "GLADreamCache",
    "GLADreamConfig",
    "GLADreamModel",
    "GLADreamTokenizer",
    "LLaDAConfig",
    "LLaDAModelLM",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARModel",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "SDARMoeModel",
]
