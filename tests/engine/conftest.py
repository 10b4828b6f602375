import pytest

from dllm_hf import LLM

from ..builders import character_tokenizer, new_model, tiny_model
from ..generation.conftest import captured  # noqa: F401  a fixture of these tests too


@pytest.fixture
def llm():
    """LLaDA with one token for each character, two completions at a time."""
    return LLM(tiny_model("llada"), tokenizer=character_tokenizer(), max_num_seqs=2, cache_policy="dual")


@pytest.fixture
def own_model():
    """A model that a test may change."""
    return new_model("sdar")
