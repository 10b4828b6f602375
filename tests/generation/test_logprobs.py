"""Log-probabilities of transferred tokens are those of the step that transferred them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import SamplingParams

from ..builders import END, MASK, ScriptedModel, generate, left_pad, new_model, refused, script, tiny_model
from ..engine.test_alone import engine_of
from .recorded_graphs import DEVICE, ROWS, fresh_model
from .test_decoder import CELLS, calls, open_decoder, seeded

CLOSE = {"abs": 2e-5, "rel": 1e-5}


class Overheard:
    """A backend whose logits are kept, with the positions that they are of."""

    def __init__(self, backend):
        self.backend, self.heard = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def __call__(self, tokens, window, state):
        logits = self.backend(tokens, window, state)
        if window.block.shape[1]:
            self.heard.append((window, logits.clone()))
        return logits


def sized(family: str) -> dict:
    return {"block_size": 4} if family not in ("llada", "dream") else {}


def drawn(data, family: str, number: int) -> list:
    every = data.draw(st.lists(calls(), min_size=number, max_size=number))
    if family == "gla_dream":
        every = [(prompt, seed, {**options, "block_length": None}) for prompt, seed, options in every]
    return every


@pytest.mark.parametrize("family, policy", CELLS)
@settings(max_examples=2)
@given(data=st.data())
@torch.no_grad()
def test_they_are_the_log_softmax_of_what_the_model_gave_at_that_step(family, policy, data):
    """Whatever temperature, filters, suppressed tokens and strategies the rows have, and whatever they ask for."""
    model = tiny_model(family, **sized(family))
    decoder = open_decoder(model, policy, False)
    decoder.backend = overheard = Overheard(decoder.backend)
    for asked, (prompt, seed, options) in zip([None, 0, 3], drawn(data, family, 3)):
        generator = seeded(seed, model.device)
        decoder.add(model.diffusion_request(prompt, generator, asked, cache_policy=policy, **options))
    canvas, transferred = decoder.canvas, 0
    while decoder.busy:
        before = canvas.tokens.clone()
        overheard.heard.clear()
        decoder.step()
        for window, logits in overheard.heard:
            truth, slots = logits.double().log_softmax(-1), window.slots[:, None]
            now = canvas.tokens[slots, window.block]
            moved = (before[slots, window.block] == MASK) & (now != MASK) & (slots > 0)  # slot 0 has not asked
            own = truth.gather(-1, now[..., None]).squeeze(-1)
            assert canvas.logprobs["own"][slots, window.block][moved].tolist() == pytest.approx(
                own[moved].tolist(), **CLOSE
            )
            moved &= slots == 2
            top = canvas.logprobs["top"][slots, window.block][moved][:, :3]
            tokens = canvas.logprobs["top_tokens"][slots, window.block][moved][:, :3]
            assert top.flatten().tolist() == pytest.approx(truth.topk(3).values[moved].flatten().tolist(), **CLOSE)
            assert torch.allclose(truth[moved].gather(-1, tokens.long()).float(), top, atol=2e-5)
            transferred += int(moved.sum())
    assert transferred


@pytest.mark.parametrize("family, policy", CELLS[::3])
@settings(max_examples=2)
@given(data=st.data())
def test_a_request_gets_those_that_it_gets_alone(family, policy, data):
    """By token, as vLLM names them; text that was given has none."""
    model = tiny_model(family, **sized(family))
    every, served = drawn(data, family, 4), engine_of(model, policy)
    for number, (prompt, seed, options) in enumerate(every):
        params = SamplingParams(seed=seed, logprobs=number or None, options=options)
        [sequence] = served.intake.prepare(prompt, params, str(number))
        sequence.shows_texts = True
        served.submit([sequence])
    outputs, told = {}, {}
    while not served.is_idle:
        for event in served.step():
            told.setdefault(event.request_id, []).extend(event.logprobs or ())
            outputs |= {event.request_id: event.output} if event.output else {}
    assert outputs["0"].logprobs is outputs["0"].cumulative_logprob is None
    for number, (prompt, seed, options) in list(enumerate(every))[1:]:
        output, generator = outputs[str(number)], [seeded(seed, model.device)]
        alone = generate(model, [prompt], generator=generator, logprobs=number, cache_policy=policy, **options)
        assert output.logprobs == told[str(number)] and len(output.logprobs) == len(output.token_ids)
        filled = zip(output.filled_prompt_token_ids or (), output.filled_prompt_logprobs or ())
        for column, (token, found) in [
            *enumerate(filled),
            *enumerate(zip(output.token_ids, output.logprobs), len(prompt)),
        ]:
            if found is None:
                assert prompt[column] != MASK and alone.logprobs[0, column].isnan()
                continue
            assert found[token].logprob == pytest.approx(float(alone.logprobs[0, column]), **CLOSE)
            best = sorted((each.rank, each.logprob) for each in found.values() if each.rank)
            wanted = alone.top_logprobs[0, column].tolist()
            assert best == [(rank, pytest.approx(each, **CLOSE)) for rank, each in enumerate(wanted, 1)]
            assert next(iter(found)) == token
        sum_of = sum(found[token].logprob for token, found in zip(output.token_ids, output.logprobs))
        assert output.cumulative_logprob == pytest.approx(sum_of)


@pytest.mark.parametrize("family, policy", [("dream", "dual"), ("sdar", "block"), ("gla_dream", "block")])
def test_graphs_give_the_same(family, policy, captured):
    model, options = fresh_model(family), {"max_new_tokens": 8, "block_length": 4, "cache_policy": policy}

    def call(**more):
        inputs = {name: tensor.to(DEVICE) for name, tensor in left_pad(ROWS).items()}
        generators = [seeded(seed, model.device) for seed in range(len(ROWS))]
        return model.diffusion_generate(**inputs, generator=generators, temperature=0.8, logprobs=2, **options, **more)

    plain = call(disable_compile=True)
    assert plain.logprobs.shape == plain.sequences.shape and plain.top_logprobs.shape == (*plain.sequences.shape, 2)
    for _ in range(3):
        fast = call()
        for name in ("logprobs", "top_logprobs"):
            assert torch.allclose(
                getattr(fast, name), getattr(plain, name), atol=5e-3 if DEVICE == "cuda" else 1e-4, equal_nan=True
            )
        assert fast.sequences.tolist() == plain.sequences.tolist()
    assert captured


def test_what_no_step_has_transferred_has_none():
    model = ScriptedModel(script([1, END, 3]), eos_token_id=END)
    output = generate(model, [[]], max_new_tokens=3, logprobs=1)
    assert output.logprobs.isnan().tolist() == [[False, False, True]]  # behind the end is padding
    assert output.top_token_ids.tolist() == [[[1], [END], [-1]]]
    batch = generate(tiny_model("llada"), [[5, MASK, 6], [7]], max_new_tokens=2, logprobs=0)
    assert batch.logprobs.isnan().tolist() == [[True, False, True, False, False], [True, True, True, False, False]]
    assert batch.top_logprobs is None and batch.logprobs.dtype == torch.float32


def test_a_token_that_a_hook_writes_has_none():
    def hook(step, tokens, logits):
        tokens = tokens.clone()
        if step == 1:
            tokens[:, 0] = 9
        return tokens

    output = generate(
        ScriptedModel(script([1, 2, 3])), [[]], max_new_tokens=3, logprobs=0, generation_tokens_hook_func=hook
    )
    assert output.sequences.tolist() == [[9, 2, 3]] and output.logprobs.isnan().tolist() == [[True, False, False]]


@pytest.mark.parametrize("wrong", [-1, 21, True, 2.0, "all"])
def test_other_numbers_are_refused(wrong):
    refused(tiny_model("llada"), "`logprobs`", "0 to 20", logprobs=wrong)


def test_a_small_vocabulary_gives_what_it_has():
    model = new_model("llada", vocab_size=8, mask_token_id=7, eos_token_id=6, pad_token_id=6)
    output = generate(model, [[1]], max_new_tokens=2, logprobs=20)
    assert (output.top_token_ids[0, 1:].sort().values[:, -8:] == torch.arange(8)).all()
    assert output.top_logprobs[0, 1:, :8].exp().sum(-1).tolist() == pytest.approx([1, 1])
