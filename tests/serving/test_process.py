"""`dllm-hf serve` as a process: what it says, and how it ends."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from dllm_hf_cli import main

from ..builders import character_tokenizer, new_model
from .served import Server

pytestmark = pytest.mark.slow  # the first process imports PyTorch, from which the others are forked
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dllm_hf_cli.serve"])
LONG = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    new_model("llada").save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def run(arguments: list[str], log: str) -> None:
    """The command, with standard error in a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["DLLM_HF_API_KEY"] = "sesame"
    code = main(["serve", *arguments])
    assert not gc.get_freeze_count()  # Triton prints what is not collected at the end as leaks
    sys.exit(code)


class Process:
    def __init__(self, folder, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = folder.parent / f"{port}.log"
        arguments = [str(folder), "--port", str(port), "--served-model-name", "tiny", *options]
        self.process = CONTEXT.Process(target=run, args=(arguments, str(self.log)))
        self.process.start()
        self.server = Server.__new__(Server)
        self.server.url = f"http://127.0.0.1:{port}"
        while True:
            try:
                assert self.server.get("/health").status == 200
                break
            except ConnectionRefusedError:
                assert self.process.is_alive(), self.log.read_text()
                time.sleep(0.1)

    def complete(self, **parameters):
        return self.server.post("/v1/completions", {**LONG, **parameters}, Authorization="Bearer sesame")

    def begin(self, number: int, **parameters) -> tuple[list, list[threading.Thread]]:
        """Requests in flight, and a list that gets their answers."""
        replies: list = []
        threads = [threading.Thread(target=lambda: replies.append(self.complete(**parameters))) for _ in range(number)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        return replies, threads

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, seconds: float) -> tuple[int, str]:
        self.process.join(timeout=seconds)
        return self.process.exitcode, self.log.read_text()


def test_requests_in_flight_finish_after_sigterm(folder):
    running = Process(folder, "--max-tokens", "7", "--max-num-seqs", "2")
    assert len(running.complete(max_tokens=None).json["choices"][0]["text"]) == 7  # the server's own default
    replies, threads = running.begin(8)
    running.signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(OSError):
        running.complete()  # nobody is let in any more
    for thread in threads:
        thread.join(timeout=30)
    code, log = running.end(10)
    assert code == 0 and "Traceback" not in log and "sesame" not in log
    assert [reply.status for reply in replies] == [200] * 8
    assert all(reply.json["usage"]["completion_tokens"] == 120 for reply in replies)


@pytest.mark.parametrize("ends_with", ["the bound", "a second signal"])
def test_what_is_in_flight_too_long_is_aborted_with_an_error(folder, ends_with):
    seconds = "0.5" if ends_with == "the bound" else "60"
    running = Process(folder, "--max-num-seqs", "1", "--shutdown-timeout", seconds)
    replies, threads = running.begin(6, n=20)
    begun = time.monotonic()
    running.signal(signal.SIGINT)
    if ends_with == "a second signal":
        time.sleep(0.3)
        running.signal(signal.SIGTERM)
    code, log = running.end(10)
    assert code == 0 and "Traceback" not in log and time.monotonic() - begun < 6
    for thread in threads:
        thread.join(timeout=5)
    assert [reply.status for reply in replies] == [503] * 6
    assert all(reply.error["code"] == "shutting_down" for reply in replies)


def children(running: Process) -> list[int]:
    pid = running.process.pid
    every = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for each in every if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text()]


def test_replicas_end_with_the_server(folder):
    running = Process(folder, "--data-parallel-size", "2", "--device", "cpu", "--max-num-seqs", "2")
    pids = children(running)
    assert len(pids) == 2
    replies, threads = running.begin(6, seed=1)
    running.signal(signal.SIGTERM)
    for thread in threads:
        thread.join(timeout=30)
    code, log = running.end(15)
    assert code == 0 and "Traceback" not in log
    assert [reply.status for reply in replies] == [200] * 6
    assert len({reply.json["choices"][0]["text"] for reply in replies}) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_divided_model_is_served_and_where_one_of_its_processes_dies_clients_are_told(folder):
    running = Process(folder, "--tensor-parallel-size", "2", "--device", "cpu")
    pids = children(running)
    assert len(pids) == 2 and running.complete().json["usage"]["completion_tokens"] == 120
    replies, threads = running.begin(2, n=20)
    begun = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=15)
    assert [reply.status for reply in replies] == [500] * 2 and time.monotonic() - begun < 10
    assert "rank 1" in replies[0].error["message"] and running.complete().status == 503
    assert running.server.get("/health").status == 503
    running.signal(signal.SIGTERM)
    code, _ = running.end(15)
    assert code == 0 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_port_that_is_taken_is_an_error_before_the_model_is_read(folder):
    log = folder.parent / "taken.log"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = CONTEXT.Process(target=run, args=(["no-such-model", "--port", port], str(log)))
        process.start()
        process.join(timeout=60)
    assert process.exitcode == 2
    assert log.read_text().strip().splitlines()[-1].startswith(f"dllm-hf: error: --host 127.0.0.1 --port {port}")
