"""`LLM(tensor_parallel_size=2)`: its processes, and what becomes of requests when one of them dies."""

import os
import signal
import time

import pytest

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import workers

from ..generation.recorded_graphs import DEVICE

PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 9]
LONG = SamplingParams(max_tokens=100, ignore_eos=True, block_length=4)


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
    """The sockets of this machine on which something listens."""
    with open("/proc/net/tcp") as file:
        return {line.split()[1] for line in file if line.split()[3] == "0A"}


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


def test_a_process_that_fails_alone_ends_the_group(new_pair, monkeypatch):
    """As where one GPU has no memory left."""
    with new_pair() as llm:
        llm._driver.engine._changes.append(FailsInOne())
        outputs = llm.generate(PROMPTS, LONG, use_tqdm=False)
    assert all("OutOfMemory: of rank 1" in output.outputs[0].error for output in outputs)


class OutOfMemory(RuntimeError):
    pass


class FailsInOne(set):
    """A change that no engine knows. Where it is unpacked, the pass of one process fails from then on."""

    def __reduce__(self):
        return fail_in_one, ()


def fail_in_one() -> set:
    from dllm_hf.generation.decoder import Decoder

    def launch(self):
        raise OutOfMemory("of rank 1")

    if os.environ["RANK"] == "1":
        Decoder.launch = launch
    return set()
