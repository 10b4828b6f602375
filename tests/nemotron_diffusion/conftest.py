from ..generation.conftest import captured  # noqa: F401  a fixture of these tests too
