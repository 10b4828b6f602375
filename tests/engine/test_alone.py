"""A request gets the tokens that `diffusion_generate` gives it alone, whatever else runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import SamplingParams
from dllm_hf.engine import engine
from dllm_hf.engine.engine import Engine
from dllm_hf.engine.outputs import CompletionOutput
from dllm_hf.generation.backend import ModelBackend
from dllm_hf.generation.window import Pays

from ..builders import new_model, tiny_model
from ..contracts.test_drafts import DRAFTED
from ..generation.test_decoder import CAPACITY, CELLS, DEVICE, alone, calls, calls_of

SLOTS = 3
ACTIONS = ["submit", "submit", "submit", "step", "step", "step", "abort", "withdraw", "fail"]


def engine_of(
    model,
    policy: str,
    uses_graphs: bool = False,
    budget: int = 24,
    slots: int = SLOTS,
    columns: int = 110,
    draft_steps: int | None = None,
) -> Engine:
    arguments = (model, None, slots, CAPACITY, {"cache_policy": policy}, 1000, budget, columns)
    return Engine(*arguments, uses_graphs=uses_graphs, draft_steps=draft_steps)


def submitted(engine: Engine, call, name: str) -> None:
    prompt, seed, options = call
    sequences = engine.intake.prepare(prompt, SamplingParams(seed=seed, options=options), name)
    for sequence in sequences:
        sequence.shows_texts = True
    engine.submit(sequences)


def failing(engine: Engine) -> list[Exception]:
    """Where an error is put that the next pass raises, which has written all that it writes."""
    run, errors = engine._decoder._run, []

    def fail(*arguments):
        run(*arguments)
        if errors:
            raise errors.pop()

    engine._decoder._run = fail
    return errors


def run(engine: Engine, calls, actions) -> dict[str, CompletionOutput]:
    """What each request got. `actions`: between the steps, requests to submit and to abort, and passes that fail."""
    waiting, outputs, told, errors = list(enumerate(calls)), {}, {}, failing(engine)
    while waiting or not engine.is_idle:
        action = actions.pop(0) if actions else "submit"
        if action == "submit" and waiting:
            number, call = waiting.pop(0)
            submitted(engine, call, str(number))
        elif action == "abort" and engine.running:
            engine.abort(next(iter(engine.running.values())).request_id)
        elif action == "withdraw" and engine.waiting:
            engine.abort(engine.waiting[-1].request_id)
        elif action == "fail" and not errors:
            errors.append(RuntimeError("boom"))
        for event in engine.step():
            told.setdefault(event.request_id, []).extend(event.token_ids)
            if event.output is not None:
                outputs[event.request_id] = event.output
                assert told[event.request_id] == event.output.token_ids
    return outputs


def alike(data, every):
    """The calls as they are, or with beginnings, of different lengths, that block families share."""
    if data.draw(st.booleans()):
        return every
    beginning = data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=20))
    cuts = st.integers(0, len(beginning))
    return [(beginning[: data.draw(cuts)] + prompt[:8], *rest) for prompt, *rest in every]


@pytest.mark.parametrize("family, policy", CELLS)
@settings(max_examples=3)
@given(data=st.data())
def test_a_request_gets_what_it_gets_alone_whatever_arrives_fails_and_is_aborted_beside_it(family, policy, data):
    model = tiny_model(family)
    every = calls_of(family, alike(data, data.draw(st.lists(calls(), min_size=2, max_size=7))))
    actions = data.draw(st.lists(st.sampled_from(ACTIONS), max_size=20))
    drafts = data.draw(st.sampled_from([None, 3]))
    served = engine_of(model, policy, budget=data.draw(st.sampled_from([1, 16, 1000])), draft_steps=drafts)
    outputs = run(served, every, actions)
    for number, call in enumerate(every):
        output, prompt = outputs[str(number)], call[0]
        text, per_forward = alone(model, policy, call)
        if output.finish_reason in ("abort", "error"):
            assert text[len(prompt) :][: len(output.token_ids)] == output.token_ids
            assert output.error == ("RuntimeError: boom" if output.finish_reason == "error" else None)
            continue
        assert output.token_ids == text[len(prompt) :], call
        assert output.tokens_per_forward == pytest.approx(per_forward) or (
            drafts and output.tokens_per_forward > per_forward
        )
        assert output.finish_reason == (
            "stop" if output.token_ids[-1:] and output.token_ids[-1] in call[2]["eos_token_id"] else "length"
        )


@pytest.mark.parametrize("family, policy", [cell for cell in CELLS if cell[1] != "none"])
@settings(max_examples=2)
@given(data=st.data())
def test_a_request_gets_it_from_graphs_too(family, policy, data, captured, monkeypatch):
    """Steps are captured with extents as data: they move, grow and shrink without another capture. Rows read together what
    they share."""
    monkeypatch.setattr(engine, "are_possible", lambda device: True)
    model = new_model(family).to(DEVICE)
    monkeypatch.setattr(ModelBackend, "pays", Pays(tokens=1000, columns=1))
    every = calls_of(family, alike(data, data.draw(st.lists(calls(), min_size=4, max_size=7))))
    drafts = data.draw(st.sampled_from([None, 3]))
    actions = data.draw(st.lists(st.sampled_from(ACTIONS), max_size=20))
    outputs = run(engine_of(model, policy, uses_graphs=True, columns=80, draft_steps=drafts), every, actions)
    for number, call in enumerate(every):
        got, text = outputs[str(number)], alone(model, policy, call)[0][len(call[0]) :]
        is_part = got.finish_reason in ("abort", "error")
        assert got.token_ids == text[: len(got.token_ids) if is_part else None], call


@pytest.mark.parametrize("attn_mode", ["auto", "torch"])  # on our kernels, and as it is
@pytest.mark.parametrize("logits_shift", [0, 1])
@pytest.mark.parametrize("slots", [4, 8])
def test_graphs_of_gla_dream_hold_for_slots_in_any_order(attn_mode, logits_shift, slots, captured, monkeypatch):
    """A step of all slots in their order comes before those in which some wait, and the others come first."""
    monkeypatch.setattr(engine, "are_possible", lambda device: True)
    changes = {"block_size": 4, "conv_size": 3, "attn_mode": attn_mode, "logits_shift": logits_shift}
    model = new_model("gla_dream", **changes).to(DEVICE)
    options = {"remasking_strategy": "low_confidence_static", "eos_token_id": [], "block_length": None}
    texts = torch.randint(0, 59, (10, 90), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = (23, 5, 41, 2, 16, 90, 33, 7, 60, 11)
    every = [(text[:length], 0, {**options, "max_new_tokens": 16}) for text, length in zip(texts, lengths, strict=True)]
    served = Engine(model, None, slots, 120, {}, 1000, 64, 1000, uses_graphs=True)
    outputs = run(served, every, ["submit"] * len(every))
    for number, call in enumerate(every):
        expected = model.diffusion_generate(torch.tensor([call[0]], device=DEVICE), disable_compile=True, **call[2])
        assert outputs[str(number)].token_ids == expected[0, len(call[0]) :].tolist(), number


@pytest.mark.parametrize(
    "family, policy, uses_graphs",
    [(*cell, False) for cell in CELLS] + [(*cell, True) for cell in CELLS if cell[1] != "none"],
)
def test_drafts_of_each_strategy_give_a_request_what_it_gets_alone(family, policy, uses_graphs, monkeypatch, request):
    """Beside requests that cannot be drafted, and while others arrive and are aborted."""
    if uses_graphs:
        request.getfixturevalue("captured")
        monkeypatch.setattr(engine, "are_possible", lambda device: True)
    kinds = [(name, 0.0) for name in DRAFTED] + [("random", 0.0), ("low_confidence", 0.8)]
    fixed = {"max_new_tokens": 13, "block_length": None if family == "gla_dream" else 4, "eos_token_id": []}
    every = [
        ([5, 6, 7, *range(number)], number, {**fixed, "remasking_strategy": name, "temperature": temperature})
        for number, (name, temperature) in enumerate(kinds)
    ]
    served = engine_of(new_model(family).to(DEVICE), policy, uses_graphs=uses_graphs, draft_steps=3)
    outputs = run(served, every, ["submit", "submit", "step", "submit", "step", "step", "submit", "step", "abort"])
    saved = {}
    for number, call in enumerate(every):
        output, (text, per_forward) = outputs[str(number)], alone(served.model, policy, call)
        length = len(output.token_ids) if output.finish_reason == "abort" else None
        assert output.token_ids == text[len(call[0]) :][:length], call
        saved[kinds[number]] = output.tokens_per_forward - per_forward if length is None else 0.0
    assert sum(saved.values()) > 0
    assert all(saved[each] == pytest.approx(0) for each in kinds[len(DRAFTED) :])
