"""The cache policy `block` gives what `none` gives, token for token, and computes nothing twice."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllm_hf import STRATEGIES

from ..builders import (
    END,
    MASK,
    VOCAB,
    assert_each_row_is_what_it_is_alone,
    generate,
    generators,
    left_pad,
    new_model,
    recorded,
    tiny_model,
)
from .conftest import models

STATIC = {"remasking_strategy": "low_confidence_static"}
# Bounds that models as unsure as the tiny ones reach now and then.
BOUNDS = {
    "low_confidence_dynamic": {"confidence_threshold": 0.3},
    "entropy_bounded": {"entropy_bound": 4.0},
    "factor": {"factor": 2.0},
}
FEW_ENDS = [END, *range(3)]  # a row ends now and then while its neighbours go on

tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, tokens, tokens, st.just(MASK)), max_size=14)
randomness = st.fixed_dictionaries(
    {"temperature": st.just(0.8), "top_k": st.sampled_from([None, 5]), "alg_temp": st.sampled_from([None, 0.3])}
)


@st.composite
def calls(draw, fewest_rows=1):
    """Prompts of a batch, and options. Masks in a prompt are positions to fill."""
    rows = draw(st.lists(prompts, min_size=fewest_rows, max_size=3))
    options = {
        "max_new_tokens": draw(st.integers(0, 13)),
        "prefill_chunk_size": draw(st.sampled_from([1, 3, 8, 2048])),
        "cfg_scale": draw(st.sampled_from([0.0, 0.0, 0.7])),
        "eos_token_id": draw(st.sampled_from([[], FEW_ENDS])),
        "denoising_steps": draw(st.sampled_from([None, 1, 2, 3])),
        **draw(st.just({}) | randomness),
    }
    assume(options["max_new_tokens"] or all(rows))
    return rows, options


def assert_equal(model, rows, **options):
    """The two policies, with the same random numbers for each row, give the same. Returns the output of `block`."""
    block, none = (
        generate(model, rows, generator=generators(range(len(rows))), cache_policy=policy, **options)
        for policy in ("block", "none")
    )
    assert block.sequences.tolist() == none.sequences.tolist()
    assert block.tokens_per_forward.tolist() == none.tokens_per_forward.tolist()
    return block


def columns_fed(calls) -> list[list[list[int]]]:
    """For each forward pass and row, the columns in the window, those that only repeat left out."""
    return [[list(dict.fromkeys(row)) for row in call["position_ids"].tolist()] for call in calls]


def span(start: int, end: int) -> list[int]:
    return list(range(start, end))


@settings(max_examples=40)
@given(
    changes=models,
    size=st.integers(1, 8),
    prompt=st.integers(0, 20),
    number=st.integers(0, 20),
    steps=st.integers(1, 4),
)
def test_prompts_of_any_length_give_the_same_in_both_policies_in_exactly_the_denoising_steps(
    changes, size, prompt, number, steps
):
    """Of whole blocks: one that is cut is done as soon as what is shown of it is."""
    assume(prompt or number)
    number += -(prompt + number) % size if number else 0
    model = tiny_model("gla_dream", **{**changes, "block_size": size})
    options = {"max_new_tokens": number, "denoising_steps": steps, "eos_token_id": [], **STATIC}
    output = assert_equal(model, [span(1, 1 + prompt)], **options)
    starts = range(prompt // size * size, prompt + number, size) if number else []
    masks = [min(start + size - prompt, size) for start in starts]
    assert output.num_forward_passes == sum(min(count, steps) for count in masks)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=4)
@given(changes=models, call=calls())
def test_the_cache_changes_no_token(strategy, changes, call):
    """Ragged batches, masks in the prompt, guidance, pieces of a prompt, ends, samples."""
    rows, options = call
    model = tiny_model("gla_dream", **changes)
    assert_equal(model, rows, remasking_strategy=strategy, **BOUNDS.get(strategy, {}), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=4)
@given(changes=models, policy=st.sampled_from(["block", "none"]), call=calls(fewest_rows=2))
def test_a_batch_gives_each_row_what_it_gets_alone(strategy, changes, policy, call):
    rows, options = call
    options = {"remasking_strategy": strategy, "cache_policy": policy, **options, **BOUNDS.get(strategy, {})}
    assert_each_row_is_what_it_is_alone(tiny_model("gla_dream", **changes), rows, **options)


def test_rows_that_wait_keep_their_state(model):
    """Rows of different numbers of blocks, given blocks between the masked ones, an empty row."""
    far = [MASK, *span(1, 16), MASK, MASK, *span(20, 33), MASK]
    rows = [far, [1, 2, 3], [], [*span(1, 6), MASK]]
    assert_equal(model, rows, max_new_tokens=6, denoising_steps=2, **STATIC)


@pytest.mark.parametrize("number", [0, 6])
@pytest.mark.parametrize("guidance", [0.0, 0.9])
def test_masks_anywhere_in_the_prompt_are_filled(model, number, guidance):
    rows = [[MASK, *span(1, 16), MASK, MASK, *span(20, 33), MASK], [1, 2, MASK, 3], [MASK], [5, 6, 7]]
    output = assert_equal(model, rows, max_new_tokens=number, cfg_scale=guidance, denoising_steps=2, **STATIC)
    assert MASK not in output.sequences
    given = left_pad(rows)["input_ids"]
    assert torch.equal(output.sequences[:, : given.shape[1]][given != MASK], given[given != MASK])


def test_a_prompt_computed_in_pieces_gives_the_same(model):
    """Pieces shorter than a block, and no multiple of it: they are rounded to whole blocks."""
    rows = [[(7 * index) % 59 for index in range(45)], span(3, 20), [1]]
    options = {"max_new_tokens": 9, **STATIC}
    whole = generate(model, rows, **options).sequences.tolist()
    for chunk in (1, 6, 8):
        with recorded(model) as calls:
            assert generate(model, rows, prefill_chunk_size=chunk, **options).sequences.tolist() == whole
        assert max(call["input_ids"].shape[1] for call in calls) <= max(chunk // 4, 1) * 4 + 4


def test_a_step_feeds_the_block_and_its_first_also_what_is_final_but_not_in_the_state(model):
    with recorded(model) as calls:
        generate(model, [span(1, 7)], max_new_tokens=9, denoising_steps=2, eos_token_id=[], **STATIC)
    expected = [span(0, 8), span(4, 8), span(4, 12), span(8, 12), span(8, 16), span(12, 16)]
    assert [fed for [fed] in columns_fed(calls)] == expected


def test_the_head_sees_the_block_alone(model):
    with recorded(model.lm_head) as seen:
        generate(model, [span(1, 11), [1]], max_new_tokens=9, **STATIC)
    assert {hidden_states.shape[1] for hidden_states in seen} == {4}


def test_the_logits_are_the_same_in_both_policies(model):
    seen = {"block": [], "none": []}
    for policy, kept in seen.items():
        look = lambda step, sequences, logits, kept=kept: kept.append(logits) or logits
        options = {"max_new_tokens": 8, "cache_policy": policy, "generation_logits_hook_func": look, "eos_token_id": []}
        generate(model, [span(1, 8), [1, 2], [3]], **options, **STATIC)
    assert len(seen["block"]) == len(seen["none"])
    for block, none in zip(*seen.values(), strict=True):
        torch.testing.assert_close(block, none, atol=1e-4, rtol=1e-4)


def rewrites(when: int, first: int, last: int, token: int):
    """A hook that puts a token into some columns after its call number `when`."""
    calls = []

    def hook(step, sequences, logits):
        calls.append(step)
        sequences = sequences.clone()
        if len(calls) == when:
            sequences[:, first:last] = token
        return sequences

    return hook


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("token", [50, MASK])
@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[1, 2, 3], [4, 5]]], ids=["one row", "two rows"])
def test_a_hook_that_changes_finished_blocks_changes_nothing_between_the_policies(rows, token, guidance):
    """What it changes is in the state already, which cannot go back in part."""
    model, outputs = tiny_model("gla_dream", logits_shift=1), []
    options = {"max_new_tokens": 25, "denoising_steps": 2, "cfg_scale": guidance, **STATIC}
    for policy in ("block", "none"):
        hook = rewrites(6, 1, 7, token)  # in the third block
        output = generate(model, rows, generation_tokens_hook_func=hook, cache_policy=policy, **options)
        outputs.append(output.sequences.tolist())
    assert outputs[0] == outputs[1]
    assert MASK not in outputs[0][0]


def test_rows_that_end_early_give_the_same_in_both_policies(model):
    rows = [[5, 17, 33], [8, 9, 10, 11, 12, 13], [], span(1, 12)]
    options = {"max_new_tokens": 24, **STATIC}
    free = generate(model, rows, eos_token_id=[], **options).sequences[:, 11:]
    output = assert_equal(model, rows, eos_token_id=[int(free[0, 2]), int(free[1, 14])], **options)
    assert (output.sequences[:, -1] == END).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_mask_is_left_in_any_precision(dtype):
    model = new_model("gla_dream", logits_shift=1).to(dtype)
    assert MASK not in generate(model, [span(1, 8), []], max_new_tokens=9, cfg_scale=0.5, **STATIC).sequences


@pytest.mark.parametrize("length", [1, 2, 8])
def test_another_block_length_than_the_model_s_is_refused(length):
    model = tiny_model("gla_dream")
    with recorded(model) as calls, pytest.raises(ValueError, match=f"`block_length={length}`.*`block_size=4`.*leave"):
        generate(model, [[1, 2]], max_new_tokens=4, block_length=length)
    assert not calls
    generate(model, [[1, 2]], max_new_tokens=4, block_length=4)


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_approximate_caches_are_not_offered(policy):
    with pytest.raises(ValueError, match="cache_policy.*choose one of block, none"):
        generate(tiny_model("gla_dream"), [[1, 2]], max_new_tokens=4, cache_policy=policy)
