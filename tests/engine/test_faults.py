"""What goes wrong beside a request, or in its own step."""

import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.generation.canvas import Canvas

from ..builders import tiny_model


def failing(model, at: int, error: BaseException):
    """Raises in a model's forward pass number `at`."""
    count = iter(range(10**9))

    def fail(*_):
        if next(count) == at:
            raise error

    return model.register_forward_pre_hook(fail)


def free(llm: LLM) -> bool:
    engine = llm._driver.engine
    return engine.is_idle and all(row is None for row in engine._decoder.rows)


PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = [[number, 2, 3] for number in range(6)]


def test_an_exception_in_a_step_ends_its_rows_and_nobody_else(own_model):
    llm = LLM(own_model, max_num_seqs=2)
    expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    failing(own_model, 3, RuntimeError("boom"))
    outputs = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    for [completion] in outputs[:2]:
        assert (completion.finish_reason, completion.error) == ("error", "RuntimeError: boom")
    assert outputs[2:] == expected[2:] and free(llm)


def test_no_memory_at_admission_is_backpressure(own_model, monkeypatch):
    llm = LLM(own_model, max_num_seqs=3)
    expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    load, count = Canvas.load, iter(range(100))

    def tight(canvas, rows):
        if next(count) in (1, 2, 4):
            raise torch.OutOfMemoryError("no memory")
        load(canvas, rows)

    lengths = [SamplingParams(max_tokens=each, ignore_eos=True) for each in (4, 8, 8, 8, 8, 8)]
    monkeypatch.setattr(Canvas, "load", tight)
    outputs = [output.outputs for output in llm.generate(PROMPTS, lengths)]
    assert outputs[1:] == expected[1:] and free(llm)


def test_what_never_fits_fails_alone(own_model, monkeypatch):
    llm = LLM(own_model, max_num_seqs=1)
    load, count = Canvas.load, iter(range(100))

    def tight(canvas, rows):
        if next(count) == 1:
            raise torch.OutOfMemoryError("no memory")
        load(canvas, rows)

    monkeypatch.setattr(Canvas, "load", tight)
    reasons = [output.outputs[0].finish_reason for output in llm.generate(PROMPTS[:3], PARAMS)]
    assert reasons == ["length", "error", "length"] and free(llm)


def test_ctrl_c_returns_what_is_finished(own_model):
    llm = LLM(own_model, max_num_seqs=2)
    expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    failing(own_model, 20, KeyboardInterrupt())
    outputs = llm.generate(PROMPTS, PARAMS)
    assert [output.finished for output in outputs] == [True, True, True, True, False, False]
    for output, [whole] in zip(outputs, expected):
        [completion] = output.outputs
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert free(llm)
    assert [output.outputs for output in llm.generate(PROMPTS, PARAMS)] == expected


@pytest.mark.parametrize("family", ["sdar", "gla_dream"])
def test_a_long_prompt_does_not_stall_those_that_denoise(family):
    """It is computed in pieces, and the others' blocks go on beside each."""
    llm = LLM(tiny_model(family), max_num_seqs=2, max_num_batched_tokens=4)
    params = SamplingParams(max_tokens=8, ignore_eos=True, denoising_steps=1)
    finished = [event.request_id for event in llm.generate_streaming([[1] * 90, [2, 3]], params) if event.output]
    assert finished == ["request-1", "request-0"]


@pytest.mark.parametrize("family, policy", [("llada", "dual"), ("dream", "prefix")])
def test_canvases_are_refreshed_in_turns(family, policy):
    """A step computes no more whole canvases than the budget allows, and the one that has waited longest goes first."""
    llm = LLM(tiny_model(family), max_num_seqs=3, cache_policy=policy, max_num_batched_tokens=60)
    decoder, widths = llm._driver.engine._decoder, []
    make = decoder._make_window
    decoder._make_window = lambda frames, slots: (
        widths.append([f.end - f.start for f in frames]),
        make(frames, slots),
    )[1]
    params = SamplingParams(max_tokens=8, block_length=4, ignore_eos=True, denoising_steps=2)
    outputs = llm.generate([[1] * 42, [2] * 42, [3] * 42], params)
    wide = [[width for width in each if width > 9] for each in widths]
    assert max(map(len, wide)) == 1 and sum(map(len, wide)) >= 6
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)


def test_requests_are_admitted_in_the_order_in_which_they_came(own_model):
    llm = LLM(own_model, max_num_seqs=2)
    lengths, admitted, submit = [20, 4, 12, 4, 8, 4], [], llm._driver.engine._decoder.add
    llm._driver.engine._decoder.add = lambda *requests: admitted.extend(requests) or submit(*requests)
    llm.generate(PROMPTS, [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths])
    assert [request.prompt for request in admitted] == PROMPTS
