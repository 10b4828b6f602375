import pytest

# The checks that stand there should explain themselves like those in a test.
pytest.register_assert_rewrite("tests.builders", "tests.gla_dream.oracles")
