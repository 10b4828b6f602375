"""Fixtures that several test modules share. What they build comes from `builders.py`. They are a plugin, which `conftest.py`
registers where tests are run: to import the libraries takes seconds."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from .builders import FAMILIES, POLICIES, character_tokenizer, tiny_model

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist has the other cores

# The same examples on every run: a failure on a machine that nobody watches must be one that anybody can repeat.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking a failure takes minutes: add Phase.shrink to look into one
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_draws_in_every_order():
    """Tests that draw from torch's global generator must not depend on which tests a worker ran before."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # without one, torch's own `manual_seed` notes a stack for each call
        torch.cuda.manual_seed_all(0)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    """Each family's tiny model, shared by all tests: leave it as it is."""
    return tiny_model(family)


@pytest.fixture
def llada():
    return tiny_model("llada")


@pytest.fixture
def dream():
    return tiny_model("dream")


@pytest.fixture(params=POLICIES)
def policy(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def uncollected():
    """The garbage collector is off."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
