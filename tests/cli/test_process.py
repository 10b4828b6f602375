"""The command as a process: how fast it answers, and how it ends when somebody makes it."""

import os
import pty
import re
import resource
import signal
import subprocess
import sys
import threading

import pytest

from dllm_hf_cli import main

from .conftest import COMMAND, PYPROJECT, SCRIPT

PATIENCE = 600  # seconds: a machine may be busy, but nothing hangs for ever
# What needs no model, and its exit code.
LIGHT = [
    (["--version"], 0),
    (["--help"], 0),
    (["generate", "--help"], 0),
    (["chat", "--help"], 0),
    (["export", "--help"], 0),
    ([], 0),
    (["genrate"], 2),
    (["--verison"], 2),
    (["generate"], 2),
    (["generate", "MODEL", "--stpes", "3"], 2),
    (["generate", "MODEL", "--steps", "x"], 2),
    (["export", "SOURCE"], 2),
    (["export", "SOURCE", "OUT", "--steps"], 2),
]


@pytest.mark.parametrize("arguments, code", LIGHT, ids=str)
def test_the_installed_command_answers_without_torch_transformers_and_the_models(arguments, code):
    heavy = ["torch", "transformers", "huggingface_hub", "numpy", "dllm_hf"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({heavy})); " + SCRIPT
    done = subprocess.run([sys.executable, "-c", blocked, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (done.stdout == "") == (code == 2) and done.stderr.count("\n") == (code == 2)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["genrate"], ["generate", "MODEL", "--stpes", "3"]])
def test_the_installed_command_answers_within_three_tenths_of_a_second_of_a_core(arguments):
    def seconds(command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, timeout=PATIENCE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # A machine that takes long to start Python and read a few of its modules takes long for this too.
    bare = min(seconds([sys.executable, "-c", "import argparse, json, subprocess"]) for _ in range(3))
    assert min(seconds([*COMMAND, *arguments]) for _ in range(3)) < max(0.3, 4 * bare)


def test_every_package_of_the_command_goes_into_the_wheel():
    packages = re.search(r"^packages = \[(.*)\]", PYPROJECT, re.MULTILINE)[1]
    assert '"src/dllm_hf"' in packages and '"src/dllm_hf_cli"' in packages


def with_default_ctrl_c():
    """A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_packages_are_imported_ends_it_with_130_and_no_word(tmp_path):
    # A package that turns the interruption into an error of its own, as compiled ones do.
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "try:\n    print('importing', flush=True)\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('numpy.core failed to import') from error\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*COMMAND, "generate", "MODEL"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=with_default_ctrl_c,
    )
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stderr) == (130, b"")


def test_ctrl_c_ends_it_with_130_and_a_clean_terminal(folder):
    ours, theirs = pty.openpty()
    arguments = ["generate", folder, "Hi", "--max-new-tokens", "4000"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=with_default_ctrl_c,
    )
    # Whatever happens, nobody waits for the 4,000 tokens.
    overdue = threading.Timer(PATIENCE, process.kill)
    overdue.start()
    os.close(theirs)
    shown = b""
    try:
        while shown.count(b"\033[33m") < 5:
            shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
        assert process.wait(PATIENCE) == 130
    finally:
        overdue.cancel()
        process.kill()
        process.wait()
        os.close(ours)
    text = shown.decode()
    assert "Traceback" not in text
    assert text.count("\033[33m") == text.count("\033[0m")
    erased = text[text.rindex("\033[J") :]
    assert "░" not in erased and re.search(r"\S\r\n$", erased)


def test_a_reader_that_leaves_early_gets_no_traceback(folder):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*COMMAND, "generate", folder, "Hi"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    os.close(writer)
    assert process.returncode == 141
    assert "Traceback" not in process.stderr and "BrokenPipe" not in process.stderr


FULL = "dllm-hf: error: standard output cannot be written to: No space left on device\n"
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@needs_dev_full
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_full_disk_behind_standard_output_is_one_line(option):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, option], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (2, FULL)


@needs_dev_full
def test_so_it_is_when_a_text_is_done(folder, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["generate", folder, "Hi", "--max-new-tokens", "2"]) == 2
    assert capsys.readouterr().err == FULL


def test_a_closed_standard_output_is_one_line_before_any_work():
    done = subprocess.run(
        [*COMMAND, "generate", "MODEL"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: os.close(1),
    )
    assert done.returncode == 2
    assert done.stderr == "dllm-hf: error: standard output is closed: there is nowhere to write to.\n"


def test_a_closed_standard_error_keeps_messages_out_of_standard_output():
    done = subprocess.run(
        [*COMMAND, "genrate"], stdout=subprocess.PIPE, text=True, timeout=PATIENCE, preexec_fn=lambda: os.close(2)
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_a_closed_standard_input_is_one_line():
    done = subprocess.run(
        [*COMMAND, "generate", "MODEL", "-"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: os.close(0),
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("dllm-hf: error: standard input is closed")
