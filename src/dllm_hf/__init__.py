"""Diffusion language models as native `transformers` models.

Importing this package registers every family with the Auto classes.
"""

__version__ = "0.1.0"

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .engine import LLM, CompletionOutput, RequestOutput, SamplingParams
from .families import FAMILIES, lines_of
from .fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, Fast_dLLM_QwenModel
from .from_autoregressive import ar_tokenizer
from .generation import (
    STRATEGIES,
    CanvasCache,
    DiffusionGenerateOutput,
    DiffusionGenerationConfig,
    DiffusionGenerationMixin,
)
from .gla_dream import GLADreamBaseModel, GLADreamCache, GLADreamConfig, GLADreamModel, GLADreamTokenizer
from .hub import add_saving_with_code
from .llada import LLaDAConfig, LLaDAModelLM
from .llada2 import LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM
from .llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from .nemotron_diffusion import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from .sdar import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

for _config, _model, _causal_lm, _tokenizer in FAMILIES:
    AutoConfig.register(_config.model_type, lines_of(_config.model_type)[0][0], exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=_tokenizer, exist_ok=True)
    for _class in {_model, _causal_lm}:
        add_saving_with_code(_class)

__all__ = [
    "FAMILIES",
    "LLM",
    "STRATEGIES",
    "CanvasCache",
    "CompletionOutput",
    "DiffusionGenerateOutput",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "Fast_dLLM_QwenModel",
    "GLADreamBaseModel",
    "GLADreamCache",
    "GLADreamConfig",
    "GLADreamModel",
    "GLADreamTokenizer",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModel",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "NemotronLabsDiffusionConfig",
    "NemotronLabsDiffusionModel",
    "RequestOutput",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARModel",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "SDARMoeModel",
    "SamplingParams",
    "ar_tokenizer",
]
