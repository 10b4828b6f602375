"""Programs that nobody has read, tried in a process of their own."""

import subprocess
import sys
from pathlib import Path

from .isolated import PASSED

_SCRIPT = Path(__file__).with_name("isolated.py")


def run(program: str, timeout: float) -> tuple[bool, str]:
    """Run a Python program in a process without network, other processes and files to write, see [`isolated`].

    Args:
        timeout: seconds, of the clock.

    Returns:
        Whether it has come to its end, without an exception and without `exit`; and what isolated it, `"seccomp"` or
        `"audit hook"`, or "" where the time was over first.
    """
    command = [sys.executable, "-I", "-S", "-B", str(_SCRIPT), str(int(timeout) + 1)]
    text = program.encode(errors="replace")
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=timeout, env={}, cwd="/")
    except subprocess.TimeoutExpired:
        return False, ""
    return done.returncode == PASSED, done.stdout.decode()
