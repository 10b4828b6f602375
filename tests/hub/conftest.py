import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


class Fresh:
    """A process without dllm_hf: tasks of `fresh.py` are noted with `ask`, done by `run`, and read with `answer`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tasks, self.answers = {}, None
        folder.mkdir()

    def ask(self, key, task: str, **arguments):
        self.tasks[key] = (task, {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()})

    def run(self, **settings):
        (self.folder / "tasks.json").write_text(json.dumps(list(self.tasks.values())))
        empty = self.folder / "elsewhere"
        empty.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HOME": str(self.folder / "home"), "HF_MODULES_CACHE": str(self.folder / "modules")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "fresh.py"), str(self.folder / "tasks.json")],
            cwd=empty,
            env={**environment, **{name: str(value) for name, value in settings.items()}},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        self.answers = dict(zip(self.tasks, json.loads(done.stdout)))
        return self

    def answer(self, key):
        answer = self.answers[key]
        assert "error" not in answer, answer.get("error", "")[-1500:]
        return answer["gave"]


@pytest.fixture(scope="module")
def fresh_processes(tmp_path_factory):
    """`fresh_processes() -> Fresh`"""
    return lambda: Fresh(tmp_path_factory.mktemp("fresh") / "process")
