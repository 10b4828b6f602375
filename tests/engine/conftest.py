from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

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


@contextmanager
def columns_fed(llm: LLM) -> Iterator[list[int]]:
    """Yields a list that receives how many columns each forward pass is fed. Not by a hook: a model with one more is another."""
    backend, fed = type(llm._driver.engine._decoder.backend), list[int]()
    plain = backend.__call__

    def counted(self, tokens, *args, **options):
        fed.append(tokens.numel())
        return plain(self, tokens, *args, **options)

    with patch.object(backend, "__call__", counted):
        yield fed
