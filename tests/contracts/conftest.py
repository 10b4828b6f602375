"""The models that owe what this folder promises."""

import os
import zlib
from pathlib import Path

import pytest

from ..builders import new_model, tiny_model
from .calls import BLOCK_FAMILIES, BLOCK_MODELS, PAIRS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Each promise is tried on each family, and each combination of the other values on one family of each kind of cache:
    families with one kind of cache differ in their layers, which know nothing of strategies, prompts and turns."""
    promises = {}
    for item in items:
        if item.path.parent == HERE and family_of(item) and not os.environ.get("DLLM_HF_EVERY_FAMILY"):
            promises.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for promise, tests in promises.items() for item in {*tests} - sample(promise, tests)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def parameters(test) -> dict:
    return test.callspec.params if hasattr(test, "callspec") else {}


def family_of(test) -> str | None:
    given = parameters(test)
    return given["pair"][0] if "pair" in given else given.get("kind", given.get("family", "")).partition(",")[0]


def cell_of(test) -> tuple[str, str]:
    """The kind of cache that is in use, and the values of the other parameters."""
    family, given = family_of(test), parameters(test)
    policy = given["pair"][1] if "pair" in given else given.get("policy")
    cache = "states" if family == "gla_dream" else "keys" if family in BLOCK_FAMILIES else "approximate"
    others = {name: value for name, value in given.items() if name not in ("pair", "kind", "family")}
    return "none" if policy == "none" else cache, str((policy, others))


def sample(promise: str, tests: list) -> set:
    """Some of a promise's tests. Which family is tried with which values differs from promise to promise."""
    turn, families, cells = zlib.crc32(promise.encode()), {}, {}
    for test in tests:
        families.setdefault(family_of(test), []).append(test)
        cells.setdefault(cell_of(test), []).append(test)
    kept = {cell[(turn + number) % len(cell)] for number, cell in enumerate(cells.values())}
    missing = [each for each in families.values() if kept.isdisjoint(each)]
    return kept | {each[(turn + number) % len(each)] for number, each in enumerate(missing)}


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
