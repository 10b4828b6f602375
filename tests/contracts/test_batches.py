"""What every family owes with every policy: a batch gives each row exactly what it gets alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import STRATEGIES

from ..builders import (
    BUILDERS,
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
from .calls import BLOCK_FAMILIES, BOUNDS, PAIRS, POLICIES, STATIC, calls, models

RAGGED = [[5, 17, 33, 2, 8, 40, 9], [12], [], [3, END, 50]]
EIGHT = {"max_new_tokens": 8, "block_length": 4, **STATIC}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_each_row_of_a_batch_what_it_gets_alone(pair, strategy):
    """Masks in the prompt, an empty prompt, rows that end early."""
    family, policy = pair
    options = {"cache_policy": policy, "remasking_strategy": strategy, **BOUNDS.get(strategy, {})}
    options |= {"max_new_tokens": 7, "denoising_steps": 3, "eos_token_id": [END, *range(8)]}
    rows = [[5, MASK, 17, 33, MASK, 8], [], [1, 2, 3]]
    looked_at = (PAIRS.index(pair) + list(STRATEGIES).index(strategy)) % 3  # each row with each strategy and each pair
    assert_each_row_is_what_it_is_alone(tiny_model(family), rows, [looked_at], **options)


@pytest.mark.parametrize("families", [("llada",), ("dream",), BLOCK_FAMILIES], ids="-".join)
@settings(max_examples=60)
@given(data=st.data())
def test_a_batch_gives_each_row_what_it_gets_alone(families, data):
    """Also where it samples, is guided, or reads its prompts in pieces."""
    family = data.draw(st.sampled_from(families))
    model, block_length = data.draw(models(family))
    rows, options = data.draw(calls(st.sampled_from(list(STRATEGIES)), fewest_rows=2))
    policy = data.draw(st.sampled_from(POLICIES[family]))
    row = data.draw(st.integers(0, len(rows) - 1))
    assert_each_row_is_what_it_is_alone(model, rows, [row], cache_policy=policy, **block_length, **options)


@pytest.mark.parametrize("family", BUILDERS)
@settings(max_examples=10)
@given(data=st.data())
def test_no_output_holds_a_mask_and_no_token_of_the_prompt_changes(family, data):
    model, block_length = data.draw(models(family))
    rows, options = data.draw(calls(st.sampled_from(list(STRATEGIES))))
    policy = data.draw(st.sampled_from(POLICIES[family]))
    prompt = left_pad(rows)["input_ids"]

    sequences = generate(model, rows, cache_policy=policy, **block_length, **options).sequences

    assert sequences.shape == (len(rows), prompt.shape[1] + options["max_new_tokens"])
    assert MASK not in sequences
    stays = prompt != MASK
    assert torch.equal(sequences[:, : prompt.shape[1]][stays], prompt[stays])


@pytest.mark.parametrize("family", BUILDERS)
@settings(max_examples=10)
@given(data=st.data())
def test_there_is_at_most_one_forward_pass_for_each_token(family, data):
    """Also for those that are decoded behind what was asked for, in the rest of the last block."""
    model, block_length = data.draw(models(family))
    [row, *_], options = data.draw(calls(st.sampled_from(list(STRATEGIES))))
    policy = data.draw(st.sampled_from(POLICIES[family]))
    options["prefill_chunk_size"] = 2048

    output = generate(model, [row], cache_policy=policy, **block_length, **options)

    length = block_length.get("block_length", model.default_block_length)
    behind = -(len(row) + options["max_new_tokens"]) % length if family in BLOCK_FAMILIES else 0
    assert output.num_forward_passes <= row.count(MASK) + options["max_new_tokens"] + behind
    if output.num_forward_passes and not behind:
        assert output.tokens_per_forward[0] >= 1


def test_whatever_token_stands_in_the_padding_changes_nothing(pair):
    family, policy = pair
    model = tiny_model(family)
    expected = model.diffusion_generate(**left_pad(RAGGED), cache_policy=policy, **EIGHT)
    for pad in (0, MASK, VOCAB - 1, -1, VOCAB + 7):
        other = left_pad(RAGGED, pad=pad)
        sequences = model.diffusion_generate(**other, cache_policy=policy, **EIGHT)
        assert sequences[:, 7:].tolist() == expected[:, 7:].tolist(), pad
        assert sequences[:, :7].tolist() == other["input_ids"].tolist(), pad


APPROXIMATE = [(family, policy) for family, policy in PAIRS if family not in BLOCK_FAMILIES]


@pytest.mark.parametrize("family, policy", APPROXIMATE)
def test_padding_is_never_attended_to(family, policy):
    """Before each forward pass, the cache is spoilt in the columns that a row does not have."""
    model = new_model(family)
    expected = generate(model, RAGGED, cache_policy=policy, **EIGHT).sequences
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
    assert generate(model, RAGGED, cache_policy=policy, **EIGHT).sequences.tolist() == expected.tolist()


def test_what_a_neighbour_says_changes_nothing(pair):
    family, policy = pair
    neighbours = [[7, 7], [MASK, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    rows = [
        generate(tiny_model(family), [[5, 17, 33], other], cache_policy=policy, **EIGHT).sequences[0, -11:].tolist()
        for other in neighbours
    ]
    assert rows[0] == rows[1]


def test_the_order_of_rows_changes_nothing(pair):
    family, policy = pair
    forth = generate(tiny_model(family), RAGGED, cache_policy=policy, **EIGHT)
    back = generate(tiny_model(family), RAGGED[::-1], cache_policy=policy, **EIGHT)
    assert back.sequences.flip(0).tolist() == forth.sequences.tolist()
    assert back.tokens_per_forward.flip(0).tolist() == forth.tokens_per_forward.tolist()


def test_each_of_the_returned_sequences_is_a_row_of_its_own(pair):
    family, policy = pair
    options = {"max_new_tokens": 6, "block_length": 4, "temperature": 1.0, "cache_policy": policy}
    rows, model = [[5, 17, 33], [12]], tiny_model(family)
    together = generate(model, rows, num_return_sequences=2, generator=generators(range(4)), **options).sequences
    assert together.shape == (4, 9)
    for index in range(4):
        row = rows[index // 2]
        alone = generate(model, [row], generator=generators([index]), **options).sequences
        assert together[index, 3 - len(row) :].tolist() == alone[0].tolist()


def test_an_end_of_sequence_token_in_prompt_or_padding_stops_nothing(pair):
    family, policy = pair
    options = {"max_new_tokens": 6, "suppress_tokens": [END], "cache_policy": policy}
    output = generate(tiny_model(family), [[END, 5, END], [END]], **options)
    assert END not in output.sequences[:, 3:]


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(pair):
    family, policy = pair
    options = {"max_new_tokens": 12, "temperature": 1.0, "cache_policy": policy}
    drawn = [
        generate(tiny_model(family), [[5, 17, 33]], generator=generators([seed]), **options).sequences.tolist()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_call_leaves_the_model_in_its_mode_and_with_its_options(pair):
    """Decoding evaluates; what a call is given is no default of the next one."""
    family, policy = pair
    model = new_model(family).train()
    before = model.generation_config.to_dict()
    generate(model, [[5, 17, 33]], cache_policy=policy, temperature=0.5, **EIGHT)
    assert model.training and all(module.training for module in model.modules())
    assert model.generation_config.to_dict() == before


def test_a_call_changes_no_weight_and_leaves_no_gradient(pair):
    family, policy = pair
    model = new_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = generate(model, RAGGED, cache_policy=policy, **EIGHT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not output.sequences.requires_grad


def test_a_call_leaves_what_it_is_given_as_it_was(pair):
    family, policy = pair
    inputs = left_pad([[5, MASK, 33], [12]])
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    tiny_model(family).diffusion_generate(**inputs, cache_policy=policy, **EIGHT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.items())


def test_the_number_of_forward_passes_is_the_number_of_calls_of_the_model(pair):
    family, policy = pair
    model = tiny_model(family)
    for options in ({}, {"denoising_steps": 2}, {"cfg_scale": 1.0}, {"remasking_strategy": "entropy"}):
        with recorded(model) as calls:
            output = generate(model, [[1, 2, 3], [], [4] * 9], max_new_tokens=9, cache_policy=policy, **options)
        assert output.num_forward_passes == len(calls)


def test_a_row_s_forward_passes_are_those_that_it_makes_alone(pair):
    """Tokens per forward pass count a row's own passes: rows side by side share them."""
    family, policy = pair
    model, options = tiny_model(family), {"cache_policy": policy, **EIGHT}
    together = generate(model, RAGGED, **options)
    alone = [generate(model, [row], **options) for row in RAGGED]
    assert together.tokens_per_forward.tolist() == [float(output.tokens_per_forward) for output in alone]
    assert together.num_forward_passes < sum(output.num_forward_passes for output in alone)
