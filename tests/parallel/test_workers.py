"""`LLM(tensor_parallel_size=2)`: its processes, and what becomes of requests when one of them dies."""

import gc
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import workers
from dllm_hf.engine.remote import Submission
from dllm_hf.engine.worker import Command

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


def processes_of(llm: LLM) -> list:
    return llm._driver.engine._processes


def ports() -> set[str]:
    """The sockets on which this process listens; those of others end with them."""
    own = set()
    for each in os.scandir("/proc/self/fd"):
        with suppress(OSError):  # that of the folder itself
            own.add(os.readlink(each.path))
    with open("/proc/net/tcp") as file:
        lines = [line.split() for line in file]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own}


def test_requests_get_the_tokens_of_one_process_and_nothing_is_left_behind(sdar, new_pair):
    before = ports()
    params = [SamplingParams(max_tokens=9, block_length=4, seed=1, temperature=t, n=2) for t in (0.0, 0.8, 1.0)]
    expected = LLM(sdar, device=DEVICE).generate(PROMPTS, params, use_tqdm=False)
    with new_pair() as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        texts: dict[tuple[str, int], str] = {}
        for event in llm.generate_streaming(PROMPTS, params):
            key = event.request_id, event.index
            texts[key] = texts.get(key, "") + event.text
            # No process waits for the parent: each has its next command.
            assert [exchange.sent for exchange in llm._driver.engine._exchanges] == [2]
        with pytest.raises(ValueError, match="the token id 1000"):
            llm.generate([1000])
    same = lambda every: [(each.text, each.token_ids) for output in every for each in output.outputs]
    assert same(outputs) == same(expected)
    assert sorted(texts.values()) == sorted(each.text for output in expected for each in output.outputs)
    assert not any(process.is_alive() for process in processes_of(llm)) and ports() <= before


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_dies_or_hangs_ends_the_group_within_ten_seconds(number, new_pair):
    with new_pair() as llm:
        finished, ends = [], 0.0
        for event in llm.generate_streaming(PROMPTS * 2, LONG):
            if not ends and event.token_ids:
                os.kill(processes_of(llm)[1].pid, number)
                ends = time.monotonic() + 10
            finished += [event.output] if event.output else []
        assert time.monotonic() < ends
        assert len(finished) == 6 and all("rank 1" in output.error for output in finished)
        assert not any(process.is_alive() for process in processes_of(llm))
        with pytest.raises(workers.WorkersError, match="make a new"):
            llm.check()
    with new_pair() as other:  # in the same parent
        assert [each.outputs[0].finish_reason for each in other.generate(PROMPTS, LONG)] == ["length"] * 3
        os.kill(processes_of(other)[1].pid, signal.SIGKILL)  # idle, its last reply unread
        assert all("by signal 9" in each.outputs[0].error for each in other.generate(PROMPTS, LONG))


def test_a_process_that_fails_alone_ends_the_group(new_pair, monkeypatch):
    """As where one GPU has no memory left."""
    with new_pair() as llm:
        llm._driver.engine._changes.append(Told(fail_in_one))
        outputs = llm.generate(PROMPTS, LONG, use_tqdm=False)
    assert all("OutOfMemory: of rank 1" in output.outputs[0].error for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiles", "waits", "stands still"])
def test_only_a_group_in_which_nobody_moves_hangs(how, new_pair, monkeypatch):
    """One that compiles for long keeps the other waiting, and all wait for their GPU in each pass."""
    monkeypatch.setattr(workers, "HANG_SECONDS", 4.0)
    with new_pair() as llm:
        llm._driver.engine._changes.append(Told(take_long, how))
        outputs = llm.generate(PROMPTS, LONG, use_tqdm=False)
    if how != "stands still":
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3
    else:
        assert all("have not moved" in output.outputs[0].error for output in outputs)


def test_closing_ends_processes_and_requests_also_in_another_thread(new_pair):
    llm = new_pair()
    events = llm.generate_streaming(PROMPTS, LONG)
    next(events)
    # Else a GPU would be through before it is closed.
    llm._driver.engine._changes.append(Told(take_long, "stands still"))
    closing = threading.Timer(0.3, llm.close)
    closing.start()
    outputs = [event.output for event in events if event.output]
    closing.join()
    assert [output.finish_reason for output in outputs] == ["abort"] * 3
    assert not any(process.is_alive() for process in processes_of(llm))
    with pytest.raises(ValueError, match="closed"):
        llm.generate(PROMPTS)


@pytest.fixture
def heeding_ctrl_c():
    """Where the tests run in the background, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_no_process(new_pair, heeding_ctrl_c):
    with new_pair() as llm:

        def interrupt():
            while not llm._driver.engine.load().running:  # before that, `generate` has nothing to return
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        outputs = llm.generate(PROMPTS, LONG, use_tqdm=False)
        interrupting.join()
        assert [each.outputs[0].finish_reason for each in outputs] == ["abort"] * 3
        assert [each.outputs[0].finish_reason for each in llm.generate(PROMPTS, LONG)] == ["length"] * 3
    other = new_pair()
    pids = [process.pid for process in processes_of(other)]
    del other
    gc.collect()
    assert not any(is_there(pid) for pid in pids)


def test_processes_end_when_their_parent_has_gone(new_pair):
    """One in the middle of a step, in which it waits for the other, and the other idle: the pipes end."""
    with new_pair() as llm:
        engine = llm._driver.engine
        changes = [Submission("a", PROMPTS[0], replace(LONG, seed=0), True, False)]
        engine._connections[0].send(Command(0.0, changes))
        time.sleep(0.3)
        for connection in engine._connections:
            connection.close()
        for process in processes_of(llm):
            process.join(10)
        assert not any(process.is_alive() for process in processes_of(llm))


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


class OutOfMemory(RuntimeError):
    pass


def fail_in_one() -> set:
    """The passes of one process fail from here on."""
    from dllm_hf.generation.decoder import Decoder

    def launch(self):
        raise OutOfMemory("of rank 1")

    if os.environ["RANK"] == "1":
        Decoder.launch = launch
    return set()


def take_long(how: str) -> set:
    """The next pass of one process takes seven seconds, or each of seven of both takes one, always at the same instruction."""
    if how == "waits":
        before_the_next_pass(lambda: time.sleep(1), passes=7)
    elif os.environ["RANK"] == "1":
        before_the_next_pass(lambda: move_about(7) if how == "compiles" else time.sleep(7))
    return set()
