import pytest

# The check that stands there should explain itself like one in a test.
pytest.register_assert_rewrite("tests.builders")
