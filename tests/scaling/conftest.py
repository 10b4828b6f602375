"""A real Ray on this machine: two CPUs, a small object store, and models that its workers read from a folder."""

import os
from pathlib import Path

import pytest

from ..builders import character_tokenizer, new_model

CHAT = "{% for turn in messages %}{{ turn.content }}:{% endfor %}"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster():
    import ray

    # Workers inherit the environment: they import this checkout, also where it is not installed.
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint: LLaDA with one token for each character."""
    path, tokenizer = tmp_path_factory.mktemp("llada"), character_tokenizer()
    tokenizer.chat_template = CHAT
    new_model("llada").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
