"""What goes wrong beside a request, or in its own step."""

import os
import random
import signal
import threading
import time

import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine.driver import Mailbox
from dllm_hf.generation.canvas import Canvas

from ..builders import character_tokenizer, new_model, tiny_model


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


@pytest.mark.parametrize("family", ["sdar", "gla_dream"])
@pytest.mark.parametrize("shares", [False, True], ids=["for its turn", "for a beginning"])
@pytest.mark.parametrize("at", range(3))
def test_who_has_a_slot_and_waits_outlives_a_step_that_fails(family, shares, at):
    """The next in turn goes on, or computes the beginning that all of them wait for."""
    prompts = [[5 if shares else number, *range(39)] for number in range(3)]
    model = new_model(family)
    expected = [LLM(model).generate([prompt], PARAMS)[0].outputs[0].token_ids for prompt in prompts]
    llm = LLM(model, max_num_seqs=3, max_num_batched_tokens=12)
    failing(model, at, RuntimeError("boom"))
    outputs = [output.outputs[0] for output in llm.generate(prompts, PARAMS)]
    assert [output.finish_reason for output in outputs].count("error") == 1 and free(llm)
    assert all(output.token_ids == each for output, each in zip(outputs, expected) if output.finish_reason == "length")


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


def test_what_cannot_be_admitted_ends_alone(own_model, monkeypatch):
    """An error that is none of memory: of those that were to be admitted together, and of nobody else."""
    llm = LLM(own_model, max_num_seqs=2)
    expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    load, count = Canvas.load, iter(range(100))

    def broken(canvas, rows):
        if next(count) == 1:
            raise RuntimeError("boom")
        load(canvas, rows)

    monkeypatch.setattr(Canvas, "load", broken)
    lengths = [SamplingParams(max_tokens=each, ignore_eos=True) for each in (4, 8, 8, 8, 8, 8)]
    outputs = [output.outputs for output in llm.generate(PROMPTS, lengths)]
    [refused] = outputs[2]
    assert (refused.finish_reason, refused.error, refused.token_ids) == ("error", "RuntimeError: boom", [])
    assert outputs[1] == expected[1] and outputs[3:] == expected[3:] and free(llm)


def test_no_memory_to_close_gaps_is_backpressure(own_model, monkeypatch):
    """Nothing has moved then, and it is tried again when a row has left."""
    llm = LLM(own_model, max_num_seqs=3, num_cache_tokens=45)
    prompts = [[number, 2, 3, *[4] * (3 * number)] for number in (0, 1, 2, 3, 0, 2)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS)]
    extents = llm._driver.engine._decoder.workspace.state.extents
    tried, move = [], extents._move

    def tight(moves):
        tried.append(moves)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no memory")
        move(moves)

    monkeypatch.setattr(extents, "_move", tight)
    for _ in range(4):
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS)] == expected
    assert len(tried) > 1 and free(llm)


def test_deadlines_of_what_has_finished_are_forgotten(own_model):
    llm = LLM(own_model, max_num_seqs=2)
    llm.generate([[1, 2]] * 300, SamplingParams(max_tokens=1, ignore_eos=True, timeout=3600))
    llm.generate([[1, 2]], SamplingParams(max_tokens=1, ignore_eos=True, timeout=3600))
    assert len(llm._driver.engine._deadlines) <= 64 + 2


def test_a_deadline_that_passes_between_an_abort_and_the_next_step_changes_nothing(own_model):
    """Of one that waits, and of one that has a slot."""
    engine = LLM(own_model, max_num_seqs=1)._driver.engine
    engine.clock, reasons = lambda: 0.0, {}
    for name in "abc":
        engine.submit(engine.intake.prepare([1, 2], SamplingParams(max_tokens=8, ignore_eos=True, timeout=1), name))
    engine.step()
    engine.abort("a", "b")
    engine.clock = lambda: 2.0
    while not engine.is_idle:
        reasons |= {event.request_id: event.finish_reason for event in engine.step() if event.output is not None}
    assert reasons == {"a": "abort", "b": "abort", "c": "timeout"}


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


class Ignorant:
    """A tokenizer that does not know a token of the model."""

    def __init__(self, tokenizer, unknown: int):
        self.tokenizer, self.unknown = tokenizer, unknown

    def decode(self, tokens, **options):
        if self.unknown in tokens:
            raise IndexError("piece id is out of range")
        return self.tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_a_token_that_the_tokenizer_does_not_know_fails_alone(streams, drafts):
    llm = LLM(tiny_model("sdar"), tokenizer=character_tokenizer(), max_num_seqs=2)
    [first, second] = [output.outputs[0] for output in llm.generate([[1, 2], [30, 31]], PARAMS)]
    unknown = next(token for token in second.token_ids if token not in first.token_ids)
    llm._driver.engine.intake.tokenizer = Ignorant(llm.tokenizer, unknown)
    if streams:
        events = llm.generate_streaming([[1, 2], [30, 31]], PARAMS, drafts=drafts)
        found = {event.request_id: event.output for event in events if event.output}
        outputs = [found[name] for name in sorted(found)]
    else:
        outputs = [output.outputs[0] for output in llm.generate([[1, 2], [30, 31]], PARAMS)]
    assert outputs[0] == first and free(llm)
    assert (outputs[1].finish_reason, outputs[1].error) == ("error", "IndexError: piece id is out of range")


@pytest.mark.parametrize("at", range(3))
def test_ctrl_c_between_the_end_of_a_step_and_its_reader_loses_nothing(own_model, at, monkeypatch):
    """In the engine, the driver and `generate` itself."""
    llm = LLM(own_model, max_num_seqs=2)
    expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS)]
    owner, name = [(llm._driver.engine._decoder, "remove"), (llm._driver.engine, "step"), (Mailbox, "take")][at]
    method, ends = getattr(owner, name), iter(range(10**6))

    def interrupted(*arguments, **options):
        result = method(*arguments, **options)
        if next(ends) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    outputs = llm.generate(PROMPTS, PARAMS)
    for output, [whole] in zip(outputs, expected, strict=True):
        [completion] = output.outputs
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert free(llm) and not all(output.finished for output in outputs)


class Then:
    """A lock, and what is done as soon as it is held."""

    def __init__(self, lock, work):
        self.lock, self.work = lock, work

    def __enter__(self):
        self.lock.acquire()
        self.work()

    def __exit__(self, *exception):
        self.lock.release()


@pytest.mark.parametrize("place", ["in a forward pass", "as the step begins"])
def test_an_iterator_that_python_collects_in_the_middle_of_a_step_does_not_wait_for_itself(place, own_model):
    llm = LLM(own_model, max_num_seqs=2)
    stream = llm.generate_streaming([[1, 2]], SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    left = [stream]

    def collect(*_):
        left.clear()

    del stream
    if place == "in a forward pass":
        own_model.register_forward_pre_hook(collect)
    else:
        llm._driver._stepping = Then(llm._driver._stepping, collect)
    done = threading.Thread(target=llm.generate, args=([[3, 4]], PARAMS), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()
    llm.generate([[3, 4]], PARAMS)
    assert free(llm)


def test_closing_beside_generate_returns_what_has_finished(own_model):
    llm = LLM(own_model, max_num_seqs=1, max_queue=1)
    count = iter(range(10**6))
    own_model.register_forward_pre_hook(lambda *_: llm.close() if next(count) == 12 else None)
    reasons = [output.outputs[0].finish_reason for output in llm.generate(PROMPTS, PARAMS)]
    assert reasons[0] == "length" and reasons[1:] == ["abort"] * 5 and free(llm)


def test_ctrl_c_at_any_moment_leaves_an_engine_that_goes_on(own_model):
    """The signal itself, at random times: it takes effect between two steps."""
    llm = LLM(own_model, max_num_seqs=3)
    expected = [output.outputs for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    dice, before, interrupted = random.Random(0), signal.getsignal(signal.SIGINT), 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(25):
            timer = threading.Timer(dice.uniform(0, 0.06), os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            try:
                outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
                interrupted += not all(output.finished for output in outputs)
                for output, [whole] in zip(outputs, expected, strict=True):
                    [completion] = output.outputs
                    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:  # outside of the engine's steps
                timer.join()
            assert free(llm)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted > 3
    assert [output.outputs for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
