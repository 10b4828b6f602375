"""The commands that the README shows first work with what the repository has."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shown() -> list[list[str]]:
    """The `dllm-hf` commands in code blocks, in their order."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("dllm-hf ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_first_commands_of_the_readme_work_as_they_are_written(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = [command for command in shown() if command[1].startswith("hub_configs/")]
    assert len(first) >= 2 and shown()[: len(first)] == first
    for command in first:
        code, stdout, stderr = run(*command)
        assert code == 0 and len(stdout) > 20 and "░" not in stdout, stderr
