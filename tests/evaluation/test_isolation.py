"""What a program that is tried can do, and what it cannot."""

import inspect
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_hf.evaluation import human_eval, infilling, isolated
from dllm_hf.evaluation.isolated import AUDIT_HOOK, PASSED, SECCOMP
from dllm_hf.evaluation.isolation import run

ALLOWED = {
    "the standard library": "import hashlib, math, re, collections; assert hashlib.md5(b'a').hexdigest()[0] == '0'",
    "reading a file": f"assert open({str(Path(__file__))!r}).read()",
    "printing much": "print('x' * 10**7)",
}
REFUSED = {
    "the network": "import socket; socket.create_connection(('127.0.0.1', PORT))",
    "a listener": "import socket; socket.create_server(('127.0.0.1', 0))",
    "another program's socket": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "a datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))",
    "a program": "import subprocess; subprocess.run([sys.executable, '-c', ''])",
    "a shell": "import os; assert os.system('true') == 0",
    "a process": "import os; pid = os.fork(); pid or os._exit(0)",
    "a signal": "import os; os.kill(os.getpid(), 0)",
    "a file": "open(FOLDER + '/new', 'w')",
    "more of a file": "open(FOLDER + '/old', 'a')",
    "removing a file": "import os; os.remove(FOLDER + '/old')",
    "renaming a file": "import os; os.rename(FOLDER + '/old', FOLDER + '/new')",
    "a folder": "import os; os.mkdir(FOLDER + '/new')",
}
FAILS = {"an error": "1 / 0", "an exit": "exit()", "a hard exit": "import os; os._exit(0)", "memory": "x = [0] * 2**31"}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a filter of system calls needs Linux")


@pytest.fixture
def where(tmp_path):
    """The beginning of a program: a folder, in which nothing may change, and a port at which somebody listens."""
    (tmp_path / "old").write_text("old")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"import sys; FOLDER, PORT = {str(tmp_path)!r}, {server.getsockname()[1]}\n"
    assert [each.name for each in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"


def with_hook(program: str) -> int:
    """The exit status of a program where there is no filter."""
    code = "import isolated; isolated.filter_system_calls = lambda: False; isolated.main()"
    path = Path(isolated.__file__).parent
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {code}", "5"]
    done = subprocess.run(command, input=program.encode(), capture_output=True)
    assert done.stdout == AUDIT_HOOK.encode()
    return done.returncode


@on_linux
@pytest.mark.parametrize("program", ALLOWED.values(), ids=ALLOWED)
def test_a_program_may_compute_read_and_print(program):
    assert run(program, 10) == (True, SECCOMP)


@on_linux
@pytest.mark.parametrize("program", (REFUSED | FAILS).values(), ids=REFUSED | FAILS)
def test_a_program_has_no_network_no_other_process_and_no_file_to_write(program, where):
    assert run(where + program, 10) == (False, SECCOMP)


def test_what_is_refused_is_possible_elsewhere(tmp_path):
    """So that the tests above are of the isolation."""
    for index, program in enumerate(REFUSED.values()):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "old").write_text("old")
        with socket.create_server(("127.0.0.1", 0)) as server:
            text = f"import sys; FOLDER, PORT = {str(folder)!r}, {server.getsockname()[1]}\n{program}"
            subprocess.run([sys.executable, "-I", "-S", "-c", text], check=True)


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
def test_without_a_filter_of_system_calls_a_hook_refuses_the_same(program, where):
    assert with_hook(where + program) != PASSED


def test_with_the_hook_a_program_may_compute():
    assert with_hook(ALLOWED["the standard library"]) == PASSED


def test_time_is_limited():
    assert run("while True: pass", 0.5) == (False, "")
    assert run("import time; time.sleep(60)", 0.5) == (False, "")


def test_programs_have_ten_seconds(monkeypatch):
    """Of the clock, which those that wait spend too."""
    asked: list[float] = []
    monkeypatch.setattr(human_eval, "run", lambda program, timeout: (asked.append(timeout) is None, ""))
    task = human_eval.Task("HumanEval/0/L0", "", "x = 1", "", "", "print")
    assert human_eval.passes(task, "x = 1")
    assert asked == [10] and inspect.signature(infilling.evaluate).parameters["timeout"].default == 10
