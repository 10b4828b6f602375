"""Requests whose prompts begin alike compute the beginning once, and get the same tokens."""

import numpy
import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import engine
from dllm_hf.generation import decoder
from dllm_hf.generation.backend import ModelBackend
from dllm_hf.generation.beginnings import Beginnings
from dllm_hf.generation.window import RUN_LENGTH, Pays

from ..builders import MASK, new_model, tiny_model
from ..generation.test_decoder import DEVICE
from ..generation.test_decoder import alone as as_a_call
from .conftest import columns_fed
from .test_alone import run

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
BEGINNING = [(7 * position) % 50 for position in range(40)]


def fed(llm: LLM, prompts, params=PARAMS) -> tuple[int, list]:
    """How many columns the model was fed, and the outputs."""
    with columns_fed(llm) as columns:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(columns), [output.outputs for output in outputs]


def alone(model, prompts):
    return [LLM(model).generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]


@pytest.mark.parametrize("family", ["sdar", "sdar_moe"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_beginning_is_computed_once(family, slots):
    """By whoever comes first; who comes at the same time waits for it, who comes later finds it in a slot."""
    model = tiny_model(family)
    prompts = [BEGINNING + [number] for number in range(8)]
    columns, outputs = fed(LLM(model, max_num_seqs=slots), prompts)
    assert [each.token_ids for [each] in outputs] == alone(model, prompts)
    own = 8 * (5 * 4 + 2 * 8)  # of each row: two blocks, four steps and one, with the block before
    assert columns <= 40 + own


def test_a_beginning_that_is_shared_stands_in_the_cache_once():
    """Rows that share it are admitted where as many copies would have no room, and all of its columns are free in the end."""
    llm = LLM(tiny_model("sdar"), max_num_seqs=8, num_cache_tokens=200)
    extents = llm._driver.engine._decoder.workspace.state.extents
    most, acquire = [], extents.acquire

    def counted(slot, size):
        given = acquire(slot, size)
        most.append(sum(extents.size_of(each) for each in range(8)))
        return given

    extents.acquire = counted
    prompts = [BEGINNING + [number] for number in range(8)]
    outputs = llm.generate([BEGINNING + [60], *prompts], PARAMS, use_tqdm=False)
    assert max(most) > 200 and [each.outputs[0].token_ids for each in outputs[1:]] == alone(llm.model, prompts)
    for slot in range(8):
        extents.release(slot)
    assert extents.free == extents.columns - 1


def test_who_has_a_part_of_a_beginning_that_nobody_reads_gets_a_copy():
    """One that read it where it stands would keep all of it."""
    llm = LLM(tiny_model("sdar"), max_num_seqs=3)
    fed(llm, [BEGINNING + [number] for number in range(2)])
    prompts = [BEGINNING[:20] + [49] * 4]
    columns, [[output]] = fed(llm, prompts)
    assert columns == 4 + 4 * 4 and [output.token_ids] == alone(llm.model, prompts)
    extents = llm._driver.engine._decoder.workspace.state.extents
    assert [extents.shared_of(slot) for slot in range(3)] == [40, 40, 0]


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_who_waits_for_a_beginning_goes_on_when_the_one_who_computes_it_is_aborted(steps):
    """One of them from where it got to, the others wait for that one."""
    model = tiny_model("sdar")
    engine = LLM(model, max_num_seqs=4, max_num_batched_tokens=8)._driver.engine
    prompts = [BEGINNING[: 40 - 4 * number] + [number] for number in range(4)]
    for number, prompt in enumerate(prompts):
        engine.submit(engine.intake.prepare(prompt, PARAMS, str(number)))
    for _ in range(steps):
        engine.step()
    engine.abort("0")
    outputs = {}
    while not engine.is_idle:
        outputs |= {event.request_id: event.output for event in engine.step() if event.output is not None}
    assert [outputs[str(number)].token_ids for number in (1, 2, 3)] == alone(model, prompts[1:])


@pytest.mark.parametrize("family", ["sdar", "gla_dream"])
def test_samples_of_a_prompt_share_its_prefill(family):
    model = tiny_model(family)
    columns, [outputs] = fed(LLM(model), [BEGINNING], SamplingParams(max_tokens=4, ignore_eos=True, n=6, seed=1))
    assert columns < 2 * 40 + 6 * (4 * 4 + 2 * 4)
    assert len({tuple(output.token_ids) for output in outputs}) == 1  # greedy


def test_the_next_turn_of_a_conversation_finds_the_last_one():
    llm = LLM(tiny_model("sdar"), max_num_seqs=4)
    _, [[first]] = fed(llm, [BEGINNING])
    longer = BEGINNING + first.token_ids + [3, 4, 5, 6]
    columns, [[second]] = fed(llm, [longer])
    assert second.token_ids == alone(llm.model, [longer])[0]
    assert columns < 40


@pytest.mark.parametrize(
    ("family", "cache_dtype", "draft_steps"),
    [("sdar", None, None), ("sdar", "fp8", 3), ("llada2", None, None)]
    + [("nemotron_diffusion", None, 2), ("fast_dllm_v2", "fp8", None)],
)
def test_rows_read_a_beginning_together_in_graphs(family, cache_dtype, draft_steps, captured, monkeypatch):
    """Rows of two beginnings, of which some share less than others, beside rows that share none. They join, leave and are
    aborted, greedy and sampled: each gets its tokens. Graphs serve whichever rows read together."""
    windows, made = [], decoder.make_list
    noted = lambda *args, **more: windows.append(made(*args, **more)) or windows[-1]
    monkeypatch.setattr(engine, "are_possible", lambda device: True)
    monkeypatch.setattr(ModelBackend, "pays", Pays(tokens=1000, columns=1))
    monkeypatch.setattr(decoder, "make_list", noted)
    other = [(5 * position + 3) % 50 for position in range(24)]
    prompts = [beginning + [number] for number in range(4) for beginning in (BEGINNING[:32], other)]
    prompts = [*prompts[:3], BEGINNING[:16] + [50, 51], *prompts[3:], [1, 2, 3], BEGINNING[:32] + [7, 8, 9, 10, 11]]
    fixed = {"eos_token_id": [], "block_length": 4, "remasking_strategy": "low_confidence_static"}
    options = [
        {**fixed, "temperature": 0.8 * (number % 3 == 1), "max_new_tokens": 5 + 5 * number % 7}
        for number in range(len(prompts))
    ]
    calls = [(prompt, number, each) for number, (prompt, each) in enumerate(zip(prompts, options))]
    kinds = {"cache_policy": "block", "cache_dtype": cache_dtype}
    model = new_model(family).to(DEVICE)
    served = engine.Engine(model, None, 8, 48, kinds, 100, 64, 300, draft_steps=draft_steps)
    actions = ["submit"] * 6 + ["step"] * 4 + ["submit"] * 3 + ["abort"] + ["submit"] * 3
    outputs = run(served, calls, actions)
    for number, (prompt, seed, each) in enumerate(calls):
        text, _ = as_a_call(model, "block", (prompt, seed, {**each, "cache_dtype": cache_dtype}))
        got = outputs[str(number)]
        assert got.token_ids == text[len(prompt) :][: len(got.token_ids) if got.finish_reason == "abort" else None]
    read = [window for window in windows if len(window.pieces)]
    assert any(len(window.pieces[window.pieces[:, 2] > 0, 0].unique()) > 1 for window in read)  # two beginnings
    assert any(len(window.beginnings[window.beginnings > 0].unique()) > 2 for window in read)  # of three lengths
    stretches = [int((each.pieces[:, 2] > 0).sum()) - len(each.columns) // RUN_LENGTH for each in read]
    # The rows of each beginning stand side by side. Of one there may be a first part that others share.
    assert max(stretches) <= 3 * (1 + bool(draft_steps))
    assert len(read) < len(windows) and len(captured) < served.num_forward_passes


def test_texts_that_differ_in_their_block_length_share_nothing():
    llm = LLM(tiny_model("sdar"), max_num_seqs=2)
    params = [SamplingParams(max_tokens=4, ignore_eos=True, block_length=size) for size in (4, 8)]
    _, [_, [second]] = fed(llm, [BEGINNING, BEGINNING], params)
    ids = torch.tensor([BEGINNING])
    expected = llm.model.diffusion_generate(
        ids, max_new_tokens=4, block_length=8, eos_token_id=[], cache_policy="block"
    )
    assert second.token_ids == expected[0, 40:].tolist()


def test_what_a_failed_step_left_is_not_shared(own_model):
    llm = LLM(own_model, max_num_seqs=2)
    expected = alone(own_model, [BEGINNING])[0]
    handle = own_model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    [output] = llm.generate([BEGINNING], PARAMS)
    assert output.outputs[0].finish_reason == "error"
    handle.remove()
    assert llm.generate([BEGINNING], PARAMS)[0].outputs[0].token_ids == expected


def test_a_mask_in_a_prompt_ends_what_can_be_shared():
    """It is filled otherwise for each request."""
    model = tiny_model("sdar")
    prompts = [[*BEGINNING[:8], MASK, *BEGINNING[9:], number] for number in range(3)]
    _, outputs = fed(LLM(model, max_num_seqs=3), prompts)
    assert [each.token_ids for [each] in outputs] == alone(model, prompts)


def test_beginnings_find_the_longest_run_of_whole_blocks():
    beginnings = Beginnings(slots=2, columns=8)
    beginnings.put(0, numpy.array([1, 2, 3, 4, 5, 6]), 2)
    beginnings.put(1, numpy.array([1, 2, 3, 4, 9, 9]), 2)
    assert beginnings.find(numpy.array([1, 2, 3, 4, 5, 6, 7]), 2) == ([0], 6)
    assert beginnings.find(numpy.array([1, 2, 3, 4, 5]), 2) == ([0, 1], 4)
    assert beginnings.find(numpy.array([1, 2, 3, 4, 5, 6]), 3) == ([], 0)
    assert beginnings.find(numpy.array([2, 1]), 2) == ([], 0)
    beginnings.put(0, numpy.array([7, 7]), 2)
    assert beginnings.find(numpy.array([1, 2, 3, 4, 5, 6]), 2) == ([1], 4)
    beginnings.drop(1)
    beginnings.drop(0)
    assert 0 not in beginnings and beginnings.find(numpy.array([7, 7]), 2) == ([], 0)
