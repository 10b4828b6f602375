"""`LLM(tensor_parallel_size=2)`: its processes, and what becomes of requests when one of them dies."""

import gc
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import workers
from dllm_hf.engine.remote import Submission
from dllm_hf.engine.worker import Command
from dllm_hf.generation.decoder import Decoder

from ..generation.recorded_graphs import DEVICE
from ..stalling import Told, before_the_next_pass, move_about

PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 9]
LONG = SamplingParams(max_tokens=100, ignore_eos=True, block_length=4, logprobs=0)


@pytest.fixture(scope="module", autouse=True)
def quick_starts(context):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "CONTEXT", context)
        yield


@pytest.fixture(scope="module")
def new_pair(sdar):
    return lambda **options: LLM(sdar, tensor_parallel_size=2, max_num_seqs=4, device=DEVICE, **options)


@pytest.fixture(scope="module")
def living():
    """What [`pair`] has made last."""
    made: list[LLM] = []
    yield made
    for llm in made:
        llm.close()


@pytest.fixture
def pair(living, new_pair) -> LLM:
    """A pair that tests share: a start takes seconds, on GPUs many. Where the test before has ended one, this is a new one in the
    same parent."""
    if not living or not all(process.is_alive() for process in processes_of(living[0])):
        living[:] = [new_pair()]
    return living[0]


def processes_of(llm: LLM) -> list:
    return llm._driver.engine._processes


def listening() -> set[str]:
    """The sockets at which somebody on this machine listens. Not their addresses: every process of NCCL, of others too, listens
    at port 28028."""
    found = set()
    # Not every system has IPv6.
    for path in (path for name in ("tcp", "tcp6") if (path := Path("/proc/net", name)).exists()):
        for line in path.read_text().splitlines()[1:]:
            _, _, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                found.add(f"socket:[{inode}]")
    return found


def sockets(*pids: int) -> set[str]:
    """Those at which these processes listen."""
    every, own = listening(), set()
    for pid in pids:
        for each in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # that of the folder itself
                own.add(os.readlink(each.path))
    return every & own


@contextmanager
def leaving_nothing(processes: list):
    """What is done here ends the processes, and nobody has the sockets any more at which they listened."""
    taken = sockets(*(process.pid for process in processes))
    assert taken and all(process.is_alive() for process in processes)
    yield
    assert not any(is_there(process.pid) for process in processes)
    assert not taken & listening()


def test_requests_get_the_tokens_of_one_process(sdar, pair):
    params = [SamplingParams(max_tokens=9, block_length=4, seed=1, temperature=t, n=2) for t in (0.0, 0.8, 1.0)]
    expected = LLM(sdar, device=DEVICE).generate(PROMPTS, params, use_tqdm=False)
    outputs = pair.generate(PROMPTS, params, use_tqdm=False)
    texts: dict[tuple[str, int], str] = {}
    for event in pair.generate_streaming(PROMPTS, params):
        key = event.request_id, event.index
        texts[key] = texts.get(key, "") + event.text
        # No process waits for the parent: each has its next command.
        assert [exchange.sent for exchange in pair._driver.engine._exchanges] == [2]
    with pytest.raises(ValueError, match="the token id 1000"):
        pair.generate([1000])
    same = lambda every: [(each.text, each.token_ids) for output in every for each in output.outputs]
    assert same(outputs) == same(expected)
    assert sorted(texts.values()) == sorted(each.text for output in expected for each in output.outputs)


KILLED, STOPPED = "is killed", "is stopped"
NO_MEMORY = {"has no memory for a pass": "launch", "has no memory for a request": "add"}


@pytest.mark.parametrize("how", [KILLED, pytest.param(STOPPED, marks=pytest.mark.slow), *NO_MEMORY])
def test_a_process_that_dies_or_hangs_or_has_no_memory_ends_the_group_within_ten_seconds(how, pair, living, new_pair):
    """Of six requests four run. All get the error, of the group nothing is left, and a new one works in the same parent."""
    finished, begun = [], 0.0
    with leaving_nothing(processes_of(pair)):
        if how in NO_MEMORY:
            pair._driver.engine._changes.append(Told(fail_in_one, NO_MEMORY[how]))
            begun = time.monotonic()
        for event in pair.generate_streaming(PROMPTS * 2, LONG):
            if not begun and event.token_ids:
                os.kill(processes_of(pair)[1].pid, signal.SIGKILL if how == KILLED else signal.SIGSTOP)
                begun = time.monotonic()
            finished += [event.output] if event.output else []
        assert time.monotonic() - begun < 10
    assert len(finished) == 6 and all("rank 1" in output.error for output in finished)
    assert all(("OutOfMemoryError" in output.error) == (how in NO_MEMORY) for output in finished)
    with pytest.raises(workers.WorkersError, match="make a new"):
        pair.check()
    living[:] = [new_pair()]  # that of the next test
    assert [each.outputs[0].finish_reason for each in living[0].generate(PROMPTS, LONG)] == ["length"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiles", "waits", "stands still"])
def test_only_a_group_in_which_nobody_moves_hangs(how, pair, monkeypatch):
    """One that compiles for long keeps the other waiting, and all wait for their GPU in each pass."""
    monkeypatch.setattr(workers, "HANG_SECONDS", 4.0)
    pair._driver.engine._changes.append(Told(take_long, how))
    outputs = pair.generate(PROMPTS, LONG, use_tqdm=False)
    if how != "stands still":
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3
    else:
        assert all("have not moved" in output.outputs[0].error for output in outputs)


def test_a_process_that_is_killed_while_all_are_idle_ends_the_group_at_the_next_request(pair):
    assert [each.outputs[0].finish_reason for each in pair.generate(PROMPTS, LONG)] == ["length"] * 3
    os.kill(processes_of(pair)[1].pid, signal.SIGKILL)  # its last reply is unread
    assert all("by signal 9" in each.outputs[0].error for each in pair.generate(PROMPTS, LONG))


def test_closing_ends_processes_and_requests_also_in_another_thread(pair):
    with leaving_nothing(processes_of(pair)):
        events = pair.generate_streaming(PROMPTS, LONG)
        next(events)
        # Else a GPU would be through before it is closed.
        pair._driver.engine._changes.append(Told(take_long, "stands still"))
        closing = threading.Timer(0.3, pair.close)
        closing.start()
        outputs = [event.output for event in events if event.output]
        closing.join()
    assert [output.finish_reason for output in outputs] == ["abort"] * 3
    with pytest.raises(ValueError, match="closed"):
        pair.generate(PROMPTS)


@pytest.fixture
def heeding_ctrl_c():
    """Where the tests run in the background, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_no_process(pair, heeding_ctrl_c):
    def interrupt():
        while not pair._driver.engine.load().running:  # before that, `generate` has nothing to return
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    outputs = pair.generate(PROMPTS, LONG, use_tqdm=False)
    interrupting.join()
    assert [each.outputs[0].finish_reason for each in outputs] == ["abort"] * 3
    assert [each.outputs[0].finish_reason for each in pair.generate(PROMPTS, LONG)] == ["length"] * 3


def test_processes_end_when_their_parent_has_gone(pair):
    """One in the middle of a step, in which it waits for the other, and the other idle: the pipes end."""
    engine = pair._driver.engine
    changes = [Submission("a", PROMPTS[0], replace(LONG, seed=0), True, False)]
    engine._connections[0].send(Command(0.0, changes))
    time.sleep(0.3)
    with leaving_nothing(processes_of(pair)):
        for connection in engine._connections:
            connection.close()
        for process in processes_of(pair):
            process.join(10)


def test_an_llm_that_is_forgotten_leaves_nothing_behind(new_pair):
    llm = new_pair()
    with leaving_nothing(processes_of(llm)):
        del llm
        gc.collect()


def is_there(pid: int) -> bool:
    """Whether a process runs, and is no zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tensor_parallel_size": 3}, "`tensor_parallel_size=3` does not divide the 4 heads"),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, "is one for all"),
        ({"tensor_parallel_size": 0}, "an integer of at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_a_process_starts(arguments, message, sdar):
    with pytest.raises(ValueError, match=message):
        LLM(sdar, **{"device": "cpu", **arguments})


def fail_in_one(name: str) -> set:
    """That method of `Decoder` finds no memory in one process from here on."""

    def fail(self, *arguments):
        raise torch.OutOfMemoryError("of rank 1")

    if os.environ["RANK"] == "1":
        setattr(Decoder, name, fail)
    return set()


def take_long(how: str) -> set:
    """The next pass of one process takes seven seconds, or each of seven of both takes one, always at the same instruction."""
    if how == "waits":
        before_the_next_pass(lambda: time.sleep(1), passes=7)
    elif os.environ["RANK"] == "1":
        before_the_next_pass(lambda: move_about(7) if how == "compiles" else time.sleep(7))
    return set()
