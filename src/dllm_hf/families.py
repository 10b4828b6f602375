"""The families of models, one line each."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, Fast_dLLM_QwenModel
from .gla_dream import GLADreamConfig, GLADreamModel, GLADreamTokenizer
from .llada import LLaDAConfig, LLaDAModelLM
from .llada2 import LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM
from .llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from .nemotron_diffusion import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from .sdar import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

# Configuration, class for `AutoModel` (as in the published repositories), class for `AutoModelForCausalLM`, tokenizer. Of
# lines with one model type the first has the configuration from whose `from_dict` the others come.
FAMILIES = (
    (LLaDAConfig, LLaDAModelLM, LLaDAModelLM, PreTrainedTokenizerFast),
    (LLaDAMoEConfig, LLaDAMoEModelLM, LLaDAMoEModelLM, PreTrainedTokenizerFast),
    (LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM, PreTrainedTokenizerFast),
    (DreamConfig, DreamModel, DreamModel, DreamTokenizer),
    (SDARConfig, SDARModel, SDARForCausalLM, Qwen2Tokenizer),
    (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM, Qwen2Tokenizer),
    (GLADreamConfig, GLADreamModel, GLADreamModel, GLADreamTokenizer),
    (
        NemotronLabsDiffusionConfig,
        NemotronLabsDiffusionModel,
        NemotronLabsDiffusionModel,
        PreTrainedTokenizerFast,
    ),
    (Fast_dLLM_QwenConfig, Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM, Qwen2Tokenizer),
)


def lines_of(model_type: str) -> Sequence[tuple[type, type, type, type]]:
    """The lines of a `model_type`: as a rule one. Raises a `ValueError` for an unknown one."""
    if lines := [line for line in FAMILIES if line[0].model_type == model_type]:
        return lines
    known = ", ".join(dict.fromkeys(line[0].model_type for line in FAMILIES))
    raise ValueError(f"`model_type={model_type!r}` is none of the families of dllm_hf ({known}).")


def stranger(model_type: str, auto_map: Any) -> str:
    """The end of a sentence that refuses a model of another family: what to do, where it is known."""
    if not auto_map:
        return "."
    return (
        f". Its `auto_map` names code of its own, as that of Stable-DiffCoder does, whose `model_type` is `llama`: without "
        f"that code transformers builds the causal {model_type} of this name, whose answers are wrong. Load it with "
        "`trust_remote_code=True` and decode with the `generate` of its own code."
    )


def family(config: PreTrainedConfig) -> tuple[type, type, type, type]:
    """The line of a configuration. Raises a `ValueError` for one of another family."""
    lines = lines_of(config.model_type)
    # By name: the class of a repository with its own code is another object.
    return next((line for line in lines if line[0].__name__ == type(config).__name__), lines[0])
