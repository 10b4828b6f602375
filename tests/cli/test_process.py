"""The command as a process: how fast it answers, and how it ends when somebody makes it."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import dllm_hf.cli

COMMAND = [sys.executable, "-c", "import sys; from dllm_hf.cli import main; sys.exit(main())"]


def test_help_and_version_need_neither_torch_nor_transformers():
    # The package is loaded on its own: importing `dllm_hf`, which is outside it, registers the models and needs both.
    alone = f"""
import importlib.util, sys
sys.modules["torch"] = sys.modules["transformers"] = None
spec = importlib.util.spec_from_file_location("cli", {dllm_hf.cli.__file__!r}, submodule_search_locations=[{str(Path(dllm_hf.cli.__file__).parent)!r}])
cli = sys.modules["cli"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
for argv in (["--version"], ["--help"], ["generate", "--help"], ["chat", "--help"], ["generate", "--steps", "x"]):
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == (2 if "x" in argv else 0), argv
"""
    subprocess.run([sys.executable, "-c", alone], check=True, capture_output=True, timeout=60)


def test_ctrl_c_ends_it_with_130_and_a_clean_terminal(folder):
    ours, theirs = pty.openpty()
    arguments = ["generate", folder, "Hi", "--max-new-tokens", "4000"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        # A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Whatever happens, nobody waits for the 4,000 tokens.
    overdue = threading.Timer(120, process.kill)
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
        assert process.wait(60) == 130
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
        [*COMMAND, "generate", folder, "Hi"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert process.returncode == 141
    assert "Traceback" not in process.stderr and "BrokenPipe" not in process.stderr
