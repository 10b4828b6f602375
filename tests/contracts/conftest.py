"""The models that owe what this folder promises."""

import pytest

from ..builders import new_model, tiny_model
from .calls import BLOCK_MODELS, PAIRS


@pytest.fixture(params=BLOCK_MODELS)
def kind(request) -> str:
    """Each kind of model with the policy `block`."""
    return request.param


@pytest.fixture
def model(kind):
    """Decodes in blocks of 4. Shared by all tests: leave it as it is."""
    family, changes = BLOCK_MODELS[kind]
    return tiny_model(family, **changes)


@pytest.fixture
def fresh(kind):
    """A model of one's own, to change."""
    family, changes = BLOCK_MODELS[kind]
    return new_model(family, **changes)


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request) -> tuple[str, str]:
    """Each family with each of its policies."""
    return request.param
