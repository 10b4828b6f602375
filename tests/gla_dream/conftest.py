"""The ways in which a GLADream may differ from another."""

import pytest

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
