"""The ways in which a GLADream may differ from another."""

import pytest

from ..builders import tiny_model

INJECTIONS = ("global", "boundary")


@pytest.fixture(params=INJECTIONS)
def injection(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["own gates", "shared gates"])
def shared(request) -> bool:
    return request.param


@pytest.fixture(params=[0, 1], ids="shift {}".format)
def shift(request) -> int:
    return request.param


@pytest.fixture(params=["global", "boundary, shifted, convolved"])
def model(request):
    """Models that decode in blocks of 4, shared by all tests: leave them as they are."""
    if request.param == "global":
        return tiny_model("gla_dream")
    return tiny_model("gla_dream", inter_block_injection_mode="boundary", logits_shift=1, conv_size=3)
