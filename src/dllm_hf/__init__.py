"""Diffusion language models as native `transformers` models.

Importing this package registers every family with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .generation import STRATEGIES, DiffusionGenerateOutput, DiffusionGenerationConfig, DiffusionGenerationMixin
from .llada import LLaDAConfig, LLaDAModelLM

__version__ = "0.1.0"

# One line for each family: configuration, the class with the head, tokenizer.
FAMILIES = (
    (LLaDAConfig, LLaDAModelLM, PreTrainedTokenizerFast),
    (DreamConfig, DreamModel, DreamTokenizer),
)

for _config, _model, _tokenizer in FAMILIES:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    # As in the published repositories, `AutoModel` gives the model with its head too.
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=_tokenizer, exist_ok=True)

__all__ = [
    "FAMILIES",
    "STRATEGIES",
    "DiffusionGenerateOutput",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "LLaDAConfig",
    "LLaDAModelLM",
]
