"""Rows that come and go: each gets what `diffusion_generate` gives it alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import STRATEGIES
from dllm_hf.generation.backend import ModelBackend
from dllm_hf.generation.configuration import OF_DENOISING_STEPS
from dllm_hf.generation.decoder import Decoder
from dllm_hf.generation.pool import fused_of

from ..builders import MASK, VOCAB, generate, new_model, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Each policy of each family; without a cache, where it is like any other, one that decodes in blocks and one that does not.
CELLS = [(family, policy) for family in ("llada", "dream") for policy in ("prefix", "dual")]
CELLS += [("dream", "none"), ("sdar", "none"), ("sdar", "block"), ("sdar_moe", "block"), ("gla_dream", "block")]
CELLS += [("llada2", "block"), ("llada_moe", "dual"), ("nemotron_diffusion", "block"), ("fast_dllm_v2", "block")]
SLOTS, CAPACITY = 3, 48

tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, tokens, tokens, st.just(MASK)), max_size=14)
BOUNDS = {
    "low_confidence_dynamic": {"confidence_threshold": 0.3},
    "entropy_bounded": {"entropy_bound": 4.0},
    "factor": {"factor": 2.0},
}


@st.composite
def calls(draw):
    """A prompt, a seed, and options of one row."""
    strategy = draw(st.sampled_from(list(STRATEGIES)))
    options = {"remasking_strategy": strategy, **BOUNDS.get(strategy, {})}
    options["max_new_tokens"] = draw(st.integers(1, 12))
    options["block_length"] = draw(st.sampled_from([2, 4, 5]))
    options["denoising_steps"] = draw(st.sampled_from([None, None, 1, 3]))
    options["temperature"] = draw(st.sampled_from([0.0, 0.0, 0.7, 1.0]))
    options["top_k"] = draw(st.sampled_from([None, None, 5]))
    options["top_p"] = draw(st.sampled_from([None, None, 0.8]))
    options["alg_temp"] = draw(st.sampled_from([None, None, 0.4]))
    options["suppress_tokens"] = draw(st.sampled_from([None, None, [5, 6, 7]]))
    options["eos_token_id"] = draw(st.sampled_from([[], [1, 2, 3], [8, 9, 10, 11, 12]]))
    return draw(prompts), draw(st.integers(0, 99)), options


def calls_of(family: str, every):
    """The calls as the family takes them: in its own blocks; some with tokens that are edited, with sub-blocks, or with blocks
    that are drafted and verified."""
    if family == "gla_dream":
        return [(prompt, seed, {**options, "block_length": None}) for prompt, seed, options in every]
    if family == "fast_dllm_v2":
        halves = lambda options: (
            {"small_block_size": 2, "use_block_cache": True} if options["block_length"] == 4 else {}
        )
        return [(prompt, seed, {**options, **(halves(options) if seed % 3 else {})}) for prompt, seed, options in every]
    if family == "nemotron_diffusion":
        rest = lambda options: {name: value for name, value in options.items() if name not in OF_DENOISING_STEPS}
        speculating = lambda seed, options: {**rest(options), "self_speculation": True} if seed % 3 else options
        return [(prompt, seed, speculating(seed, options)) for prompt, seed, options in every]
    if family != "llada2":
        return every
    edits = lambda seed, options: seed % 2 and STRATEGIES[options["remasking_strategy"]].confidence == "probability"
    editing = lambda seed: {"editing_threshold": seed / 500, "max_post_steps": seed % 5}
    return [
        (prompt, seed, {**options, **(editing(seed) if edits(seed, options) else {})})
        for prompt, seed, options in every
    ]


def open_decoder(model, policy: str, has_graphs: bool, slots: int = SLOTS) -> Decoder:
    backend = ModelBackend(model, policy != "none", fused_of(model)[0] if has_graphs else None)
    return Decoder.open(backend, slots, CAPACITY, uses_graphs=has_graphs)


def seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def alone(model, policy: str, call) -> tuple[list[int], float]:
    """The row's text up to its end, and its tokens per forward pass."""
    prompt, seed, options = call
    inputs = {"cache_policy": policy, "disable_compile": True, "return_dict_in_generate": True, **options}
    ids = torch.tensor([prompt], dtype=torch.long, device=model.device).view(1, -1)
    output = model.diffusion_generate(ids, generator=[seeded(seed, model.device)], **inputs)
    return up_to_end(output.sequences[0].tolist(), call), float(output.tokens_per_forward[0])


def up_to_end(text: list[int], call) -> list[int]:
    prompt, _, options = call
    ends = [i + 1 for i in range(len(prompt), len(text)) if text[i] in options["eos_token_id"]]
    return text[: min(ends, default=len(text))]


@torch.no_grad()
def decode(model, decoder: Decoder, policy: str, calls, pauses: list[int]) -> list[tuple[list[int], float]]:
    """What each row gets in a decoder that rows join, one after another and as slots and `pauses` allow, and leave."""
    waiting, running, found = list(enumerate(calls)), {}, {}
    while waiting or running:
        while waiting and len(running) < SLOTS and not (pauses and running and pauses.pop(0)):
            index, call = waiting.pop(0)
            prompt, seed, options = call
            request = model.diffusion_request(prompt, seeded(seed, model.device), cache_policy=policy, **options)
            running[index] = decoder.add(request)[0]
        decoder.step()
        for index, row in list(running.items()):
            if row.is_done:
                passes, transfers = decoder.canvas.counts[row.slot].tolist()
                text = up_to_end(decoder.canvas.text(row).tolist(), calls[index])
                found[index] = (text, transfers / max(passes, 1))
                decoder.remove(running.pop(index))
    return [found[index] for index in range(len(calls))]


def check(family, policy, data, has_graphs):
    model = new_model(family).to(DEVICE) if has_graphs else tiny_model(family)
    every = calls_of(family, data.draw(st.lists(calls(), min_size=2, max_size=6)))
    pauses = data.draw(st.lists(st.booleans(), max_size=12))
    got = decode(model, open_decoder(model, policy, has_graphs), policy, every, pauses)
    for (text, per_forward), call in zip(got, every, strict=True):
        expected = alone(model, policy, call)
        assert text == expected[0], call
        assert per_forward == pytest.approx(expected[1])


@pytest.mark.parametrize("family, policy", CELLS)
@settings(max_examples=3)
@given(data=st.data())
def test_rows_that_join_and_leave_get_what_they_get_alone(family, policy, data):
    """With strategies, temperatures, thresholds, block lengths, ends and seeds of their own, each at its own block and
    step."""
    check(family, policy, data, has_graphs=False)


@pytest.mark.parametrize("family, policy", [cell for cell in CELLS if cell[1] != "none"])
@settings(max_examples=2)
@given(data=st.data())
def test_rows_that_join_and_leave_get_it_from_graphs_too(family, policy, data, captured):
    check(family, policy, data, has_graphs=True)


@settings(max_examples=25)
@given(data=st.data())
def test_after_any_joins_and_leaves_every_slot_is_free_again(data):
    """Rows that are done and rows that are not: a slot is free as soon as its row has left, and what it held is nobody's."""
    model = tiny_model("sdar")
    decoder = open_decoder(model, "block", False)
    rows: list = []
    for action in data.draw(st.lists(st.sampled_from(["join", "join", "step", "leave"]), max_size=20)):
        if action == "join" and len(rows) < SLOTS:
            prompt, seed, options = data.draw(calls())
            request = model.diffusion_request(prompt, seeded(seed, model.device), cache_policy="block", **options)
            rows += decoder.add(request)
        elif action == "leave" and rows:
            decoder.remove(rows.pop(data.draw(st.integers(0, len(rows) - 1))))
        elif action == "step":
            decoder.step()
        assert sum(row is None for row in decoder.rows) == SLOTS - len(rows)
    for row in rows:
        decoder.remove(row)
    assert decoder.rows == [None] * SLOTS and not decoder.features and not decoder.busy
    call = data.draw(calls())
    [(text, _)] = decode(model, decoder, "block", [call], [])
    assert text == alone(model, "block", call)[0]


def test_a_full_decoder_and_a_row_that_is_too_long_are_refused_and_nothing_is_lost():
    model = tiny_model("llada")
    decoder = open_decoder(model, "dual", False, slots=1)
    [row] = decoder.add(model.diffusion_request([1, 2, 3], cache_policy="dual", max_new_tokens=4))
    with pytest.raises(ValueError, match="remove rows first"):
        decoder.add(model.diffusion_request([1], cache_policy="dual", max_new_tokens=4))
    while decoder.busy:
        decoder.step()
    decoder.remove(row)
    with pytest.raises(ValueError, match="does not fit into 48"):
        decoder.add(model.diffusion_request([1] * 40, cache_policy="dual", max_new_tokens=9))
    assert decoder.rows == [None]


def test_logits_of_a_plain_function_are_decoded():
    """As in docs/backends.md: no model, no module."""

    class Echo:
        """Position i is answered with token i + 1, the surer the further left."""

        device, vocab_size, takes_lists = torch.device("cpu"), 64, False
        logits_shift, block_grid, sees_earlier_blocks, confidence_source = 0, "prompt", False, "raw"

        def open(self, slots, width):
            return None

        def covers(self, window):
            return False

        def forget(self, state, slot, final_length, column, block_length):
            return 0

        def __call__(self, tokens, window, state):
            positions = window.columns.gather(1, window.keep)
            answers = torch.nn.functional.one_hot(positions + 1, self.vocab_size)
            return answers * (9.0 - 0.1 * positions[..., None])

    request = tiny_model("llada").diffusion_request([7], max_new_tokens=5, block_length=2)
    decoder = Decoder.open(Echo(), 1, 8)
    [row] = decoder.add(request)
    while decoder.busy:
        decoder.step()
    assert decoder.canvas.text(row).tolist() == [7, 2, 3, 4, 5, 6]
    assert decoder.num_forward_passes == 5


def test_the_rows_of_a_batch_do_not_wait_for_each_other():
    """A row whose blocks need fewer steps goes on to its next one."""
    model = tiny_model("sdar")
    together = generate(model, [[1, 2, 3, MASK], [4, 5, 6, 7]], max_new_tokens=8, eos_token_id=[])
    assert together.num_forward_passes == 9  # one mask and eight, beside eight


def test_a_request_for_blocks_that_the_model_cannot_decode_in_is_refused():
    with pytest.raises(ValueError, match="`block_length=5`.*`block_size=4`.*leave"):
        tiny_model("gla_dream").diffusion_request([1, 2], block_length=5)
