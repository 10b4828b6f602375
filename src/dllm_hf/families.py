"""The families of models, one line each."""

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .gla_dream import GLADreamConfig, GLADreamModel, GLADreamTokenizer
from .llada import LLaDAConfig, LLaDAModelLM
from .sdar import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

# Configuration, class for `AutoModel` (as in the published repositories), class for `AutoModelForCausalLM`, tokenizer.
FAMILIES = (
    (LLaDAConfig, LLaDAModelLM, LLaDAModelLM, PreTrainedTokenizerFast),
    (DreamConfig, DreamModel, DreamModel, DreamTokenizer),
    (SDARConfig, SDARModel, SDARForCausalLM, Qwen2Tokenizer),
    (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM, Qwen2Tokenizer),
    (GLADreamConfig, GLADreamModel, GLADreamModel, GLADreamTokenizer),
)


def family(model_type: str) -> tuple[type, type, type, type]:
    """The line of a `model_type`. Raises a `ValueError` for an unknown one."""
    for line in FAMILIES:
        if line[0].model_type == model_type:
            return line
    known = ", ".join(line[0].model_type for line in FAMILIES)
    raise ValueError(f"`model_type={model_type!r}` is none of the families of dllm_hf ({known}).")
