import os

import pytest


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Models, and what they are exported to for ExecuTorch."""
    from .executorch_exports import Exports  # needs the extra `edge`

    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    return Exports(top / "executorch")


@pytest.fixture(scope="session")
def exported(exports):
    """`exported(family, quantization=None) -> (model, folder)`"""
    return exports.exported


@pytest.fixture(scope="session")
def both(exports):
    """`both(family) -> (model, DiffusionEdge)`"""
    return exports.both
