"""The families of this folder."""

import pytest

SDAR_FAMILIES = ("sdar", "sdar_moe")


@pytest.fixture(params=SDAR_FAMILIES)
def family(request) -> str:
    return request.param
