"""The families of models, one line each."""

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .fast_dllm_v2 import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, Fast_dLLM_QwenModel
from .gla_dream import GLADreamConfig, GLADreamModel, GLADreamTokenizer
from .llada import LLaDAConfig, LLaDAModelLM
from .nemotron_diffusion import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from .sdar import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

# Configuration, class for `AutoModel` (as in the published repositories), class for `AutoModelForCausalLM`, tokenizer.
FAMILIES = (
    (LLaDAConfig, LLaDAModelLM, LLaDAModelLM, PreTrainedTokenizerFast),
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


def family(model_type: str) -> tuple[type, type, type, type]:
    """The line of a `model_type`. Raises a `ValueError` for an unknown one."""
    for line in FAMILIES:
        if line[0].model_type == model_type:
            return line
    known = ", ".join(line[0].model_type for line in FAMILIES)
    raise ValueError(f"`model_type={model_type!r}` is none of the families of dllm_hf ({known}).")
