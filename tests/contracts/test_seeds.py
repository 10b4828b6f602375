"""Families in which a pass over the clean text before a block decides the block's first token, its seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import SamplingParams
from dllm_hf.engine.engine import Engine

from ..builders import END, MASK, generate, new_tokens, recorded, refused, tiny_model
from .calls import SEEDED, STATIC, assert_cache_is_final, assert_policies_agree, columns_fed, span

OPTIONS = {"eos_token_id": [], **STATIC}
PROMPT = span(1, 9)  # two blocks of 4


@pytest.fixture(params=SEEDED)
def model(request):
    return tiny_model(request.param)


def test_a_pass_over_the_finished_block_decides_the_next_block_s_first_token(model):
    """Then the passes of the block feed the block alone, and the head sees what they decide."""
    with recorded(model) as calls, recorded(model.lm_head) as seen:
        output = generate(model, [PROMPT], max_new_tokens=8, denoising_steps=2, **OPTIONS)
    assert [fed for [fed] in columns_fed(calls)] == [
        span(0, 8),  # the prompt
        span(8, 12),
        span(8, 12),
        span(8, 12),  # the finished block
        span(12, 16),
        span(12, 16),
    ]
    assert [bool((call["input_ids"] == MASK).any()) for call in calls] == [False, True, True] * 2
    assert [hidden_states.shape[1] for hidden_states in seen] == [1, 3, 3] * 2
    assert output.num_forward_passes == 6 and output.tokens_per_forward.tolist() == [pytest.approx(8 / 6)]
    assert output.past_key_values.final_lengths == [12]
    assert_cache_is_final(model, output.past_key_values)


@pytest.mark.parametrize("family", SEEDED)
@settings(max_examples=12)
@given(
    data=st.data(),
    prompt=st.integers(0, 14),
    number=st.integers(1, 14),
    steps=st.integers(1, 4),
    size=st.integers(1, 6),
)
def test_there_is_one_pass_more_for_each_block_that_is_seeded(family, data, prompt, number, steps, size):
    model = tiny_model(family)
    number += -(prompt + number) % size if model.block_grid == "zero" else 0
    options = {"max_new_tokens": number, "denoising_steps": steps, "block_length": size, **OPTIONS}
    options |= {"small_block_size": size} if model.default_small_block_size else {}
    output = assert_policies_agree(model, [span(1, 1 + prompt)], **options)
    starts = range(prompt // size * size if model.block_grid == "zero" else prompt, prompt + number, size)
    masks = [min(start + size, prompt + number) - max(start, prompt) for start in starts]
    seeds = [start >= max(prompt, 1) for start in starts]
    assert output.num_forward_passes == sum(seed + min(count - seed, steps) for count, seed in zip(masks, seeds))


def test_a_seed_is_the_best_token_whatever_its_confidence(model):
    """And the same in every strategy, since it is decided alone."""
    seed, *_ = new_tokens(model, PROMPT, max_new_tokens=4, **OPTIONS)
    others = [{"confidence_threshold": 1.0}, {"remasking_strategy": "random"}, {"confidence_suppress_tokens": [seed]}]
    for options in others:
        assert new_tokens(model, PROMPT, max_new_tokens=4, eos_token_id=[], **options)[0] == seed


def test_blocks_of_one_token_are_decoded_autoregressively(model):
    with recorded(model) as calls:
        tokens = new_tokens(model, PROMPT, max_new_tokens=4, block_length=1, **OPTIONS)
    assert [fed for [fed] in columns_fed(calls)] == [span(0, 8), [8], [9], [10]]
    causal = {"use_causal_mask": True} if model.causal_context else {"block_size": 1}
    text = list(PROMPT)
    for _ in range(4):
        with torch.no_grad():
            logits = model(torch.tensor([text]), position_ids=torch.arange(len(text))[None], **causal).logits[0, -1]
        logits[MASK] = -torch.inf
        text.append(int(logits.argmax()))
    assert text[8:] == tokens


def test_a_row_ends_with_a_seed_that_is_an_end_of_sequence(model):
    seed, *_ = new_tokens(model, PROMPT, max_new_tokens=8, **OPTIONS)
    output = generate(model, [PROMPT], max_new_tokens=8, **{**OPTIONS, "eos_token_id": [seed]})
    assert output.sequences[0, 8:].tolist() == [seed] + [END] * 7
    assert output.num_forward_passes == 1


def test_masks_before_the_prompt_s_end_are_seeded_where_their_block_begins(model):
    rows = [[*span(1, 9), MASK, MASK, 30, 31, *span(9, 13)], [MASK, 2, 3, MASK, MASK], [1, 2, 3, 4, MASK]]
    output = assert_policies_agree(model, rows, max_new_tokens=3, **OPTIONS)
    assert MASK not in output.sequences


@pytest.mark.parametrize("prompt", [span(1, 9), span(1, 8)], ids=["of whole blocks", "with a remainder"])
def test_requests_with_one_prompt_share_its_keys_and_each_computes_its_seed(model, prompt):
    expected = new_tokens(model, prompt, max_new_tokens=9, **OPTIONS)
    engine = Engine(model, None, 3, 40, {"cache_policy": "block"}, 10, 16, 120)
    for name in "abc":
        engine.submit(engine.prepare(prompt, SamplingParams(max_tokens=9, options=OPTIONS), name))
    found = {}
    while not engine.is_idle:
        for event in engine.step():
            found.setdefault(event.request_id, []).extend(event.token_ids)
    assert list(found.values()) == [expected] * 3


# --- sub-blocks


def test_sub_blocks_are_decoded_from_left_to_right():
    model = tiny_model("fast_dllm_v2")
    options = {"max_new_tokens": 8, "block_length": 8, "small_block_size": 4, "output_history": True, **OPTIONS}
    history = [step[0, 8:].tolist() for step in generate(model, [PROMPT], **options).history]
    masked = [[index for index, token in enumerate(step) if token == MASK] for step in history]
    assert [set(step) & {4, 5, 6, 7} == {4, 5, 6, 7} for step in masked] == [True] * 4 + [False] * 4
    assert masked[3] == [4, 5, 6, 7]


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
def test_with_a_cache_in_the_block_a_sub_block_is_fed_alone_once_its_first_position_is_decided(strategy):
    model = tiny_model("fast_dllm_v2")
    options = {
        "max_new_tokens": 8,
        "block_length": 8,
        "small_block_size": 4,
        "use_block_cache": True,
        "eos_token_id": [],
    }
    options |= {"remasking_strategy": strategy, "confidence_threshold": 0.3, "output_history": True}
    with recorded(model) as calls:
        output = generate(model, [PROMPT], **options)
    fed = [columns for [columns] in columns_fed(calls)]
    before = [[MASK] * 8, *(step[0, 8:].tolist() for step in output.history)]
    assert fed[:2] == [span(0, 8), span(8, 16)]
    for columns, text in zip(fed[2:], before[2:]):
        first = 0 if MASK in text[:4] else 4
        assert columns == (span(8, 16) if text[first] == MASK else span(8 + first, 12 + first))
    assert len({len(columns) for columns in fed[1:]}) == 2


def test_sub_blocks_are_8_positions_where_they_divide_the_block_and_else_the_block():
    model = tiny_model("fast_dllm_v2")
    for block, expected in ((32, 8), (8, 8), (12, 12), (4, 4)):
        assert model.diffusion_request([1], max_new_tokens=8, block_length=block).options.small_block_size == expected


def test_impossible_sub_blocks_are_refused():
    fast, sdar = tiny_model("fast_dllm_v2"), tiny_model("sdar")
    refused(fast, "`small_block_size=3` does not divide `block_length=8`", block_length=8, small_block_size=3)
    refused(fast, "`small_block_size` must be an integer of at least 1", small_block_size=0)
    refused(fast, "use_block_cache.*cache_policy='block'", use_block_cache=True, cache_policy="none")
    for option in ({"small_block_size": 2}, {"use_block_cache": True}):
        refused(sdar, f"{next(iter(option))}.*Fast_dLLM_QwenForCausalLM.*SDARForCausalLM has none", **option)
