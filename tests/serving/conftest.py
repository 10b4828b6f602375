import pytest


@pytest.fixture(scope="module")
def server():
    """One that the tests of a module share: leave it as it is."""
    from .served import serving, tiny_llm

    with serving(tiny_llm()) as running:
        yield running
