"""Who gets columns of the cache, and when."""

import math

import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.generation import decoder

from ..builders import recorded, tiny_model
from .conftest import columns_fed


def admitted_of(llm: LLM) -> list[list[int]]:
    """The prompts of the rows that join, noted as they do."""
    decoder, prompts = llm._driver.engine._decoder, []
    add = decoder.add
    decoder.add = lambda *requests: prompts.extend(request.prompt for request in requests) or add(*requests)
    return prompts


def params(length: int) -> SamplingParams:
    return SamplingParams(max_tokens=length, ignore_eos=True)


def test_a_completion_takes_its_own_columns_and_no_more():
    """Four canvases of 12 columns run at once where two of the longest would not fit."""
    llm = LLM(tiny_model("sdar"), max_num_seqs=4, max_model_len=64, num_cache_tokens=4 * 13 + 1)
    with pytest.raises(ValueError, match="there are 51.*raise `num_cache_tokens`"):
        llm.generate([[1] * 50], params(10))
    with recorded(llm.model) as calls:
        llm.generate([[1, 2, 3, 4]] * 4, params(8))
    assert max(len(call["input_ids"]) for call in calls) == 4


def test_shorter_ones_pass_one_that_waits_for_room_but_not_without_end():
    llm = LLM(tiny_model("sdar"), max_num_seqs=3, num_cache_tokens=60)
    llm._driver.engine.max_passed_over = 2
    admitted = admitted_of(llm)
    prompts = [[1] * 30, [2] * 40, [3], [4], [5], [6]]
    outputs = llm.generate(prompts, [params(8), *[params(4)] * 5])
    assert admitted == [[1] * 30, [3], [4], [2] * 40, [5], [6]]
    for output, prompt in zip(outputs, prompts):
        alone = LLM(llm.model).generate([prompt], params(len(output.outputs[0].token_ids)))
        assert output.outputs[0].token_ids == alone[0].outputs[0].token_ids


def test_the_device_waits_for_one_step_s_prompts_and_the_others_are_admitted_beside_it():
    """The prompts of 40 tokens that a step of 64 computes; beside a long step more than beside a short one."""
    engine = LLM(
        tiny_model("sdar"), max_num_seqs=64, num_cache_tokens=64 * 50, max_num_batched_tokens=64
    )._driver.engine
    for number in range(60):
        engine.submit(engine.intake.prepare([number] * 40, params(4), str(number)))
    add, admitted = engine._decoder.add, []
    engine._decoder.add = lambda *requests: admitted.append(len(requests)) or add(*requests)
    engine.step()
    assert admitted == [2, 16 + engine._decoder.columns_fed // 32] and engine._decoder.columns_fed >= 40
    engine.step()
    assert admitted[2] == 16 + engine._decoder.columns_fed // 32


def test_beginnings_are_kept_until_their_columns_are_needed():
    llm = LLM(tiny_model("sdar"), max_num_seqs=3, num_cache_tokens=100)
    beginning = list(range(40))

    def fed(prompt) -> int:
        with columns_fed(llm) as columns:
            llm.generate([prompt], params(4))
        return sum(columns)

    first, again = fed(beginning), fed(beginning)
    assert again <= first - 36
    fed([7] * 90)  # needs all columns
    assert fed(beginning) == first


@pytest.mark.parametrize("family, policy", [("llada", "dual"), ("sdar", "block")])
def test_gaps_are_closed_for_one_that_fits_into_all_of_them_together(family, policy):
    """Rows go on at their new columns, and get the same tokens."""
    llm = LLM(tiny_model(family), max_num_seqs=4, num_cache_tokens=4 * 20, cache_policy=policy, block_length=4)
    extents = llm._driver.engine._decoder.workspace.state.extents
    moves, move = [], extents._move
    extents._move = lambda *run: (moves.append(run), move(*run))
    prompts = [[number] * 8 for number in range(3)] + [[9] * 30]
    lengths = [4, 10, 4, 5]
    outputs = llm.generate(prompts, list(map(params, lengths)))
    assert moves
    for output, prompt, length in zip(outputs, prompts, lengths):
        alone = LLM(llm.model, cache_policy=policy, block_length=4).generate([prompt], params(length))
        assert output.outputs[0].token_ids == alone[0].outputs[0].token_ids


def test_a_longer_one_takes_the_columns_of_free_slots_that_all_hold_its_beginning():
    llm = LLM(tiny_model("sdar"), max_num_seqs=2)
    llm.generate([[1] * 8] * 2, params(4))
    [output] = llm.generate([[1] * 8], params(40))
    [alone] = LLM(llm.model).generate([[1] * 8], params(40))
    assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_what_fits_is_admitted_whatever_else_stands_in_the_cache():
    """A beginning of forty columns, which two texts shared that have ended, does not stay as a whole for one that has half of it."""
    llm = LLM(tiny_model("sdar"), max_num_seqs=3, num_cache_tokens=100)
    beginning = list(range(40))
    llm.generate([[*beginning, number] for number in (1, 2)], params(3))
    prompts = [[*beginning[:20], 49, 49, 49, 49], [45] * 60]  # 29 and 65 columns
    for output, prompt in zip(llm.generate(prompts, params(4)), prompts):
        [alone] = LLM(llm.model).generate([prompt], params(4))
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_no_memory_to_move_what_stands_in_the_cache_costs_no_slot(monkeypatch):
    llm = LLM(tiny_model("sdar"), max_num_seqs=2)
    engine = llm._driver.engine
    seats = engine._decoder.seats
    forget, count = seats.backend.forget, iter(range(100))

    def tight(*arguments):
        if next(count) == 1:
            raise torch.OutOfMemoryError("no memory")
        return forget(*arguments)

    monkeypatch.setattr(seats.backend, "forget", tight)
    outputs = llm.generate([[number] * 5 for number in range(4)], params(4))
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 4
    assert engine.is_idle and sorted(seats.free) == [0, 1] and seats.rows == [None, None]


def test_of_many_rows_equally_many_begin_a_block_in_each_step(monkeypatch):
    """A first pass feeds more tokens than others, and the products of steps of one size take least time."""

    def run() -> tuple[list[int], list]:
        llm = LLM(tiny_model("sdar"), max_num_seqs=40, num_cache_tokens=2000, max_model_len=48)
        prompts, begun, events = iter([number] * 4 for number in range(40)), [], []
        for number in [12, 9, 9, 10, *[0] * 50]:
            for _ in range(number):
                llm.submit(next(prompts), SamplingParams(max_tokens=40, block_length=4, ignore_eos=True))
            llm._driver.turn(None)
            events += llm._submitted.take()
            begun.append(sum(row.taken == 1 for row in llm._driver.engine.running))
        return begun[12:28], sorted((event.request_id, event.output.token_ids) for event in events if event.output)

    begun, outputs = run()
    assert begun == [10] * 16 and len(outputs) == 40
    monkeypatch.setattr(decoder, "FREE_TOKENS", math.inf)
    uneven, expected = run()
    assert max(uneven) == 22 and outputs == expected
