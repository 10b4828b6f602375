"""A batch gives each row exactly what it gets alone."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllm_hf import STRATEGIES

from ..builders import (
    END,
    FAMILIES,
    MASK,
    POLICIES,
    VOCAB,
    assert_each_row_is_what_it_is_alone,
    generate,
    generators,
    left_pad,
    new_model,
    tiny_model,
)

MANY_ENDS = [END, *range(8)]  # so many that random models end rows early

tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, st.just(MASK)), max_size=8)
paces = st.one_of(
    st.just({}),
    st.builds(lambda number: {"steps": number}, st.integers(1, 14)),
    st.builds(lambda number: {"denoising_steps": number}, st.integers(1, 7)),
)


guidance = st.sampled_from([0.0, 0.0, 0.7])
randomness = st.fixed_dictionaries(
    {"temperature": st.just(0.8), "top_k": st.sampled_from([None, 5]), "alg_temp": st.sampled_from([None, 0.3])}
)
greed = st.just({})


@st.composite
def calls(draw, sampling=greed):
    """Prompts of a batch, and options. Masks in a prompt are positions to fill."""
    rows = draw(st.lists(prompts, min_size=2, max_size=3))
    options = {
        "max_new_tokens": draw(st.integers(0, 9)),
        "block_length": draw(st.none() | st.integers(1, 6)),
        "cfg_scale": draw(guidance),
        "eos_token_id": draw(st.sampled_from([END, MANY_ENDS])),
        **draw(paces),
        **draw(sampling),
    }
    assume(options["max_new_tokens"] or all(rows))
    return rows, options


# Bounds that models as unsure as the tiny ones reach now and then.
BOUNDS = {
    "low_confidence_dynamic": {"confidence_threshold": 0.3},
    "entropy_bounded": {"entropy_bound": 4.0},
    "factor": {"factor": 2.0},
}


def check_rows(family, cache_policy, strategy, call):
    rows, options = call
    options = {**options, **BOUNDS.get(strategy, {}), "cache_policy": cache_policy, "remasking_strategy": strategy}
    assert_each_row_is_what_it_is_alone(tiny_model(family), rows, **options)


every_kind_of_decoding = [
    pytest.mark.parametrize("strategy", STRATEGIES),
    pytest.mark.parametrize("cache_policy", POLICIES),
    pytest.mark.parametrize("family", FAMILIES),
]


def each(marks):
    """One decorator out of several."""

    def decorate(test):
        for mark in marks:
            test = mark(test)
        return test

    return decorate


@each(every_kind_of_decoding)
@settings(max_examples=12)
@given(call=calls())
def test_a_batch_gives_each_row_what_it_gets_alone(family, cache_policy, strategy, call):
    check_rows(family, cache_policy, strategy, call)


@each(every_kind_of_decoding)
@settings(max_examples=10)
@given(call=calls(sampling=randomness))
def test_a_batch_gives_each_row_what_it_gets_alone_also_when_it_samples(family, cache_policy, strategy, call):
    check_rows(family, cache_policy, strategy, call)


any_kind_of_decoding = st.fixed_dictionaries(
    {"cache_policy": st.sampled_from(POLICIES), "remasking_strategy": st.sampled_from(list(STRATEGIES))}
)


@settings(max_examples=60)
@given(family=st.sampled_from(FAMILIES), kind=any_kind_of_decoding, call=calls(sampling=greed | randomness))
def test_no_output_holds_a_mask_and_no_token_of_the_prompt_changes(family, kind, call):
    rows, options = call
    prompt = left_pad(rows)["input_ids"]

    sequences = generate(tiny_model(family), rows, **kind, **options).sequences

    assert sequences.shape == (len(rows), prompt.shape[1] + options["max_new_tokens"])
    assert MASK not in sequences
    stays = prompt != MASK
    assert torch.equal(sequences[:, : prompt.shape[1]][stays], prompt[stays])


@settings(max_examples=60)
@given(family=st.sampled_from(FAMILIES), kind=any_kind_of_decoding, call=calls(sampling=greed | randomness))
def test_there_is_at_most_one_forward_pass_for_each_token(family, kind, call):
    [row, *_], options = call

    output = generate(tiny_model(family), [row], **kind, **options)

    assert output.num_forward_passes <= row.count(MASK) + options["max_new_tokens"]
    if output.num_forward_passes:
        assert output.tokens_per_forward[0] >= 1


STATIC = {"remasking_strategy": "low_confidence_static"}
RAGGED = [[5, 17, 33, 2, 8, 40, 9], [12], [], [3, END, 50]]


@pytest.mark.parametrize("pad", [0, MASK, VOCAB - 1, -1, VOCAB + 7])
def test_whatever_token_stands_in_the_padding_changes_nothing(model, policy, pad):
    options = {
        "cache_policy": policy,
        "max_new_tokens": 8,
        "block_length": 4,
        "remasking_strategy": "low_confidence_static",
    }
    usual, other = left_pad(RAGGED), left_pad(RAGGED, pad=pad)

    expected = model.diffusion_generate(**usual, **options)
    sequences = model.diffusion_generate(**other, **options)

    assert sequences[:, 7:].tolist() == expected[:, 7:].tolist()
    assert sequences[:, :7].tolist() == other["input_ids"].tolist()


def test_what_a_neighbour_says_changes_nothing(model, policy):
    options = {
        "cache_policy": policy,
        "max_new_tokens": 8,
        "block_length": 4,
        "remasking_strategy": "low_confidence_static",
    }
    neighbours = [[7, 7], [MASK, 1, 2, 3, 4, 5, 6, 7, 8, 9]]

    rows = [generate(model, [[5, 17, 33], other], **options).sequences[0, -11:].tolist() for other in neighbours]

    assert rows[0] == rows[1]


def test_padding_is_never_attended_to(family, policy):
    """Before each forward pass, the cache is spoilt in the columns that a row does not have."""
    model = new_model(family)
    options = {"cache_policy": policy, "max_new_tokens": 8, "block_length": 4, **STATIC}
    expected = generate(model, RAGGED, **options).sequences
    exists = torch.arange(7 + 8 + 1) < torch.tensor([len(row) + 8 for row in RAGGED])[:, None]

    def spoil(module, args, kwargs):
        cache, mask = kwargs["past_key_values"], kwargs["attention_mask"]
        rows = slice(None) if cache is None else cache.layers[0].window.slots
        if cache is not None or len(mask) == len(RAGGED):  # else some of the rows, which ones nobody says
            width = exists[rows].sum(-1).max()
            seen = torch.ones_like(exists[rows][:, :width]) if mask is None else mask
            assert torch.equal(seen, exists[rows][:, :width])
        for layer in cache.layers if cache is not None else ():
            if layer.is_initialized:
                layer.keys.masked_fill_(~exists[:, None, :, None], 1e4)
                layer.values.masked_fill_(~exists[:, None, :, None], 1e4)

    model.register_forward_pre_hook(spoil, with_kwargs=True)
    assert generate(model, RAGGED, **options).sequences.tolist() == expected.tolist()


def test_an_end_of_sequence_token_in_prompt_or_padding_stops_nothing(model, policy):
    rows = [[END, 5, END], [END]]
    output = generate(model, rows, cache_policy=policy, max_new_tokens=6, block_length=2, suppress_tokens=[END])
    assert END not in output.sequences[:, 3:]


def test_each_of_the_returned_sequences_is_a_row_of_its_own(model, policy):
    options = {"max_new_tokens": 6, "block_length": 4, "temperature": 1.0, "cache_policy": policy}
    rows = [[5, 17, 33], [12]]

    together = generate(model, rows, num_return_sequences=2, generator=generators(range(4)), **options).sequences

    assert together.shape == (4, 9)
    for index in range(4):
        row = rows[index // 2]
        alone = generate(model, [row], generator=generators([index]), **options).sequences
        assert together[index, 3 - len(row) :].tolist() == alone[0].tolist()
