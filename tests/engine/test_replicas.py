"""`data_parallel_size`: several engines behind one `LLM`."""

import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import llm as llm_module
from dllm_hf.engine import remote, replicas, workers
from dllm_hf.engine.arguments import gpus_of_replicas
from dllm_hf.engine.heart import COMPILER
from dllm_hf.engine.replica import Replica
from dllm_hf.engine.replicas import MUCH_FULLER, Replicas

from ..builders import character_tokenizer, new_model, tiny_model
from ..stalling import Told, before_the_next_pass, move_about

ROOM = {"max_tokens": 8, "block_length": 4}
LONG = SamplingParams(max_tokens=120, ignore_eos=True, denoising_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdar")
    new_model("sdar").save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_starts():
    """Processes forked from one that has imported PyTorch, in the place of some that each do so for seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dllm_hf"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "CONTEXT", context)
        yield


@pytest.fixture
def leaves_no_process():
    """Those of `pair` apart, which were there before."""
    before = multiprocessing.active_children()
    yield
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.fixture(scope="module")
def pair(folder):
    """Two replicas that tests share: leave them alive."""
    with LLM(folder, data_parallel_size=2, max_num_seqs=4, device="cpu") as llm:
        yield llm
    assert not any(each.process.is_alive() for each in llm._driver.engine._replicas)


def test_replicas_give_what_one_engine_gives(pair, folder):
    one = LLM(folder, device="cpu")
    prompts = ["abc", [3, 4], "a", "bcd" * 30, "abc"]
    params = [
        SamplingParams(temperature=1.0, seed=5, n=3, **ROOM),
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=12, stop=["b"]),
        SamplingParams(max_tokens=0),
        SamplingParams(remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.5, max_tokens=9),
    ]
    got, wanted = pair.generate(prompts, params), one.generate(prompts, params)
    assert [each.outputs for each in got] == [each.outputs for each in wanted]
    assert [(each.prompt, each.prompt_token_ids) for each in got] == [
        (each.prompt, each.prompt_token_ids) for each in wanted
    ]
    torch.manual_seed(3)
    drawn = pair.generate("abc", SamplingParams(temperature=2.0, max_tokens=20))
    torch.manual_seed(3)
    assert one.generate("abc", SamplingParams(temperature=2.0, max_tokens=20))[0].outputs == drawn[0].outputs


def test_events_of_replicas_stream_and_drafts_and_aborts_reach_them(pair):
    names = [pair.submit("abc", LONG, drafts=True), pair.submit("de", LONG, request_id="mine")]
    texts, reasons, drafts = dict.fromkeys(names, ""), {}, 0
    for event in pair.events():
        pair.abort("mine")
        texts[event.request_id] += event.text
        drafts += event.draft is not None
        if event.output is not None:
            reasons[event.request_id] = event.finish_reason
            assert event.output.text == texts[event.request_id]
    assert reasons == {names[0]: "length", "mine": "abort"} and drafts > 50


def test_requests_are_checked_before_they_are_sent(pair):
    with pytest.raises(ValueError, match="prompt 1: The canvas of 10003 positions is longer"):
        pair.generate(["abc", "abc"], [SamplingParams(max_tokens=4), SamplingParams(max_tokens=10**4)])
    assert pair._driver.engine.is_idle
    assert pair.effective_options(SamplingParams(temperature=0.5)).sampling_temperature == 0.5


def test_parameters_that_change_after_they_were_checked_change_nothing_and_end_no_replica(pair):
    params = SamplingParams(seed=1, **ROOM, options={"temperature": 1.0})
    expected = [output.outputs[0].token_ids for output in pair.generate([[3]] * 3, params)]
    stream = pair.generate_streaming([[3]] * 3, params)
    params.options["temprature"] = 0
    outputs = [event.output for event in stream if event.output]
    assert [output.token_ids for output in outputs] == expected


def test_threads_share_replicas_and_both_of_them_work(pair):
    before = [each.load.num_forward_passes for each in pair._driver.engine._replicas]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda each: pair.generate([[each, each + 1]], LONG, use_tqdm=False), range(8)))
    assert all(len(output[0].outputs[0].token_ids) == 120 for output in outputs)
    loads = [each.load for each in pair._driver.engine._replicas]
    assert all(load.num_forward_passes > passes for load, passes in zip(loads, before, strict=True))
    assert pair.load().num_forward_passes == sum(load.num_forward_passes for load in loads)


@pytest.mark.slow
def test_a_replica_that_is_killed_fails_its_requests_and_nobody_elses(folder, leaves_no_process):
    with LLM(folder, data_parallel_size=2, device="cpu") as llm:
        names = [llm.submit([each], replace(LONG, logprobs=each % 3)) for each in range(6)]
        dead, other = llm._driver.engine._replicas
        events, texts, outputs, begun = llm.events(), dict.fromkeys(names, ""), {}, None
        for event in events:
            texts[event.request_id] += event.text
            if event.output is not None:
                outputs[event.request_id] = event.output
            if begun is None and event.text and event.request_id in dead.outstanding:
                lost, begun = set(dead.outstanding), time.monotonic()
                os.kill(dead.process.pid, signal.SIGKILL)
        assert time.monotonic() - begun < 10 and set(outputs) == set(names) and len(lost) == 3
        for name, output in outputs.items():
            assert output.finish_reason == ("error" if name in lost else "length")
            assert output.text == texts[name] and len(output.logprobs) == len(output.token_ids)
            assert ("replica 0" in (output.error or "") and "exit code -9" in output.error) == (name in lost)
        assert llm.generate([[1]] * 3, LONG)[2].outputs[0].finish_reason == "length"
        os.kill(other.process.pid, signal.SIGKILL)
        assert llm.generate([[1]], LONG)[0].outputs[0].finish_reason == "error"
        with pytest.raises(RuntimeError, match="Every replica has died"):
            llm.check()
        assert llm.generate([[1]], LONG)[0].outputs[0].finish_reason == "error"
    with LLM(folder, data_parallel_size=2, device="cpu") as llm:
        assert llm.generate([[1]], LONG)[0].outputs[0].finish_reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["stands still", "is stopped", "is stopped before it is asked", "compiles", "compiles at once", "waits"]
)
def test_a_replica_that_hangs_is_ended_and_one_that_compiles_or_waits_in_each_pass_is_not(
    how, folder, leaves_no_process, monkeypatch
):
    for module in (replicas, remote):
        monkeypatch.setattr(module, "HANG_SECONDS", 2.5)
    with LLM(folder, data_parallel_size=2, device="cpu") as llm:
        hung, other = llm._driver.engine._replicas
        if how == "is stopped before it is asked":
            os.kill(hung.process.pid, signal.SIGSTOP)
        few = [[each] for each in range(60)]
        prompts = [100 * each for each in few * 5] if "before" in how else few  # more than a pipe takes
        names = [llm.submit(each, SamplingParams(max_tokens=4, ignore_eos=True)) for each in prompts]
        if "stopped" not in how:
            hung.send(Told(take_long, how))
        begun, outputs, is_stopped = time.monotonic(), {}, False
        for event in llm.events():
            if how == "is stopped" and not is_stopped:
                os.kill(hung.process.pid, signal.SIGSTOP)
                is_stopped = True
            if event.output is not None:
                outputs[event.request_id] = event.output
        assert time.monotonic() - begun < 10 and set(outputs) == set(names)
        failed = {name for name, output in outputs.items() if output.finish_reason == "error"}
        if how in ("compiles", "compiles at once", "waits"):
            assert time.monotonic() - begun > 4 and not failed and hung.process.is_alive()
            return
        assert failed and all("replica 0" in outputs[name].error for name in failed)
        assert {outputs[name].finish_reason for name in set(names) - failed} == {"length"}
        assert not hung.process.is_alive() and other.process.is_alive()
        assert llm.generate([[1]], LONG)[0].outputs[0].finish_reason == "length"


def take_long(how: str) -> list:
    """Five seconds: the next pass stands still, or is at work as kernels are compiled, by other threads, for which this one waits,
    in many instructions or in one; or each of five waits, always at the same instruction, as for a GPU."""
    in_one: dict = {}
    exec(compile("import time\ndef stand(): time.sleep(5)", COMPILER, "exec"), in_one)

    def compile_aside() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(*([move_about, 5] if how == "compiles" else [in_one["stand"]])).result()

    if how == "waits":
        before_the_next_pass(lambda: time.sleep(1), passes=5)
    else:
        before_the_next_pass(compile_aside if how.startswith("compiles") else lambda: time.sleep(5))
    return []


@pytest.mark.slow
def test_replicas_whose_divided_models_compile_do_not_hang(folder, leaves_no_process, monkeypatch):
    """They wait at one instruction for the processes that compile."""
    monkeypatch.setattr(replicas, "HANG_SECONDS", 2.5)
    monkeypatch.setattr(llm_module, "LLM", divided)
    with LLM(folder, data_parallel_size=2, device="cpu") as llm:
        begun, outputs = time.monotonic(), llm.generate([[1], [2]], LONG)
        assert time.monotonic() - begun > 4
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 2


def divided(source: str, **arguments) -> LLM:
    """One replica, on two processes whose first pass takes long."""
    workers.CONTEXT = multiprocessing.get_context("forkserver")
    llm = LLM(source, **{**arguments, "tensor_parallel_size": 2})
    llm._driver.engine._changes.append(Told(compile_first))
    return llm


def compile_first() -> set:
    before_the_next_pass(lambda: move_about(5))
    return set()


@pytest.mark.slow
def test_closing_or_forgetting_an_llm_ends_its_processes(folder, leaves_no_process):
    llm = LLM(folder, data_parallel_size=2, device="cpu")
    for _ in range(100):
        llm.submit([1], LONG)
    reader = threading.Thread(target=lambda: reasons.extend(each.finish_reason for each in llm.events(wait=True)))
    reasons: list = []
    reader.start()
    time.sleep(0.3)
    llm.close()
    reader.join(5)
    assert not reader.is_alive() and reasons.count("abort") > 20
    assert not any(each.process.is_alive() for each in llm._driver.engine._replicas)
    with pytest.raises(ValueError, match="closed"):
        llm.generate([[1]], LONG)
    forgotten = LLM(folder, data_parallel_size=2, device="cpu")
    processes = [each.process for each in forgotten._driver.engine._replicas]
    assert all(each.is_alive() for each in processes)
    del forgotten
    gc.collect()
    assert not any(each.is_alive() for each in processes)


def test_what_a_replica_cannot_load_is_said_by_the_parent(folder, tmp_path, leaves_no_process):
    shutil.copytree(folder, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(OSError, match="safetensors"):
        LLM(tmp_path / "weightless", data_parallel_size=2, device="cpu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data_parallel_size": 0}, "`data_parallel_size` must be an integer of at least 1"),
        ({"data_parallel_size": 2, "model": new_model("sdar")}, "must be a folder or a repository"),
        ({"data_parallel_size": 2, "device": "cuda:1"}, "`device=cuda:1` is one for"),
        ({"data_parallel_size": 3, "device": "cuda"}, "needs 3 GPUs, but there are 2"),
        ({"data_parallel_size": 2, "device": "cpu", "max_model_len": 10**9}, "more than the .* positions"),
        ({"data_parallel_size": 2, "device": "cpu", "cache_policy": "dual"}, "`cache_policy='dual'`"),
        ({"tensor_parallel_size": 2, "device": "cpu", "mask_token_id": 99}, "`mask_token_id` holds 99"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_a_process_starts(folder, monkeypatch, arguments, message):
    for module in (replicas, workers):
        monkeypatch.setattr(module, "start", lambda *_: pytest.fail("A process was started."))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": folder, **arguments})


def test_each_replica_sees_its_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,GPU-7,3")
    arguments = {"device": "cuda", "data_parallel_size": 2, "tensor_parallel_size": 2}
    assert gpus_of_replicas("folder", arguments) == ["5,2", "GPU-7,3"]


# --- routing, without processes


@pytest.fixture
def router(monkeypatch):
    """Three replicas that never answer."""
    monkeypatch.setattr(Replicas, "__init__", lambda self: None)
    router = Replicas()
    router._shares_beginnings, router._holders, router._told = True, replicas.OrderedDict(), []
    pipe = SimpleNamespace(closed=False)
    router._replicas = [Replica(index, None, pipe, pipe) for index in range(3)]

    def route(prompt: list[int], columns: int) -> int:
        chosen = router._choose(prompt, columns)
        chosen.columns += columns
        return chosen.index

    return SimpleNamespace(route=route, replicas=router._replicas, router=router)


def test_requests_go_to_the_replica_with_the_fewest_columns(router):
    assert [router.route([each], columns) for each, columns in enumerate([100, 30, 50, 10, 10, 100])] == [
        0,
        1,
        2,
        1,
        1,
        1,
    ]


def test_a_shared_beginning_leads_to_the_same_replica_unless_it_is_much_fuller(router):
    beginning = list(range(200))
    first = router.route([*beginning, 1], 210)
    assert [router.route([*beginning, each], 210) for each in range(MUCH_FULLER)] == [first] * MUCH_FULLER
    second = router.route([*beginning, 9], 210)
    assert second != first
    # Now that two hold it, the emptier of them gets the next.
    assert router.route([*beginning, 10], 210) == second
    assert router.route(list(range(100, 300)), 1) not in (first, second)


def test_a_turn_follows_its_conversation_and_not_others_with_the_same_system_prompt(router):
    system = list(range(150))
    conversations = [[*system, *[each] * 400] for each in (1, 2)]
    router.route(conversations[0], 600)
    router.replicas[0].columns += 10_000
    other = router.route(conversations[1], 600)
    router.replicas[0].columns -= 10_000
    router.replicas[other].columns += 500
    assert [router.route([*each, 7, 8, 9], 700) for each in conversations] == [0, other]


@pytest.mark.parametrize("are_there, reason", [(True, "error"), (False, "abort")])
def test_a_request_that_finds_no_replica_says_if_they_have_died_or_were_closed(router, are_there, reason):
    router.router._end = SimpleNamespace(alive=are_there)
    router.replicas[0].requests.closed = True
    router.router.submit(LLM(tiny_model("sdar"))._driver.engine.intake.prepare([1], LONG, "a"))
    assert [event.finish_reason for event in router.router._told] == [reason]
