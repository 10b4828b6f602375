"""The families: one line for each."""

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from .dream import DreamConfig, DreamModel, DreamTokenizer
from .gla_dream import GLADreamConfig, GLADreamModel, GLADreamTokenizer
from .llada import LLaDAConfig, LLaDAModelLM
from .sdar import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

# Configuration, what `AutoModel` gives (as the published repositories have it), what `AutoModelForCausalLM` gives,
# tokenizer.
FAMILIES = (
    (LLaDAConfig, LLaDAModelLM, LLaDAModelLM, PreTrainedTokenizerFast),
    (DreamConfig, DreamModel, DreamModel, DreamTokenizer),
    (SDARConfig, SDARModel, SDARForCausalLM, Qwen2Tokenizer),
    (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM, Qwen2Tokenizer),
    (GLADreamConfig, GLADreamModel, GLADreamModel, GLADreamTokenizer),
)


def family(model_type: str) -> tuple[type, type, type, type]:
    """The line of a `model_type`. Raises a `ValueError` for one that is not here."""
    for line in FAMILIES:
        if line[0].model_type == model_type:
            return line
    known = ", ".join(line[0].model_type for line in FAMILIES)
    raise ValueError(f"`model_type={model_type!r}` is none of the families of dllm_hf ({known}).")
