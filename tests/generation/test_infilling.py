"""Masks anywhere in the prompt are positions to fill."""

import pytest
import torch

from ..builders import MASK, ScriptedModel, generate, new_tokens, recorded, script

POEM = [10, MASK, 12, 13, 14, MASK, MASK, 17, 18, 19]
STRATEGY = {"remasking_strategy": "low_confidence_static"}


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("block_length", [None, 1, 3, 4, 50])
def test_masks_in_the_prompt_are_filled_and_nothing_else_changes(model, policy, block_length, number):
    options = {"max_new_tokens": number, "block_length": block_length, "cache_policy": policy}
    [sequence] = generate(model, [POEM], **options).sequences.tolist()
    assert MASK not in sequence
    assert len(sequence) == len(POEM) + number
    assert all(new == old for new, old in zip(sequence, POEM, strict=False) if old != MASK)


def test_filling_takes_one_forward_pass_for_each_mask(model, policy):
    options = {"max_new_tokens": 0, "block_length": 4, "cache_policy": policy, **STRATEGY}
    assert generate(model, [POEM], **options).num_forward_passes == POEM.count(MASK)


def test_a_block_without_masks_is_left_alone():
    model = ScriptedModel(script([1] * 10))
    model.cache_policies = ("dual",)
    options = {"max_new_tokens": 0, "block_length": 2, "denoising_steps": 1, **STRATEGY}
    output = generate(model, [POEM], output_history=True, **options)
    # Blocks from the prompt's end backwards: (0, 2), (4, 6) and (6, 8) hold masks, (2, 4) and (8, 10) none.
    changed = torch.stack(output.history)[:, 0].diff(dim=0, prepend=torch.tensor([POEM])).nonzero().tolist()
    assert changed == [[0, 1], [1, 5], [2, 6]]


def test_blocks_are_filled_from_left_to_right(model):
    with recorded(model) as calls:
        generate(model, [POEM], max_new_tokens=4, block_length=2, **STRATEGY)
    first_masks = [(call["input_ids"][0] == MASK).nonzero()[0].item() for call in calls]
    assert first_masks == sorted(first_masks)


def test_a_prompt_of_masks_is_an_empty_prompt_with_new_tokens(dream):
    options = {"remasking_strategy": "maskgit_plus", "steps": 3}
    filled = generate(dream, [[MASK] * 5], max_new_tokens=0, **options).sequences[0].tolist()
    assert filled == new_tokens(dream, [], max_new_tokens=5, **options)


def test_masks_are_filled_at_the_first_and_last_position(model, policy):
    [sequence] = generate(model, [[MASK, 5, MASK]], max_new_tokens=0, cache_policy=policy).sequences.tolist()
    assert MASK not in sequence
    assert sequence[1] == 5


def test_filling_reads_what_stands_after_the_mask(model):
    endings = [[token, token + 1, token + 2] for token in range(20, 40, 4)]
    options = {"max_new_tokens": 0, "block_length": 1}
    filled = {
        tuple(generate(model, [[5, MASK, MASK, *ending]], **options).sequences[0, 1:3].tolist()) for ending in endings
    }
    assert len(filled) > 1


@pytest.mark.parametrize("number, expected", [(0, [3, 0, 0]), (4, [3, 4, 0])])
def test_the_masks_of_a_prompt_count_as_tokens(number, expected):
    model = ScriptedModel(script([1] * 20))
    assert generate(model, [POEM], max_new_tokens=number).num_forward_passes == sum(expected)


def test_rows_may_have_nothing_to_fill(model, policy):
    sequences = generate(model, [[5, 6, 7], [8, MASK]], max_new_tokens=0, cache_policy=policy).sequences
    assert sequences[0].tolist() == [5, 6, 7]
    assert MASK not in sequences[1]


def test_a_row_of_padding_may_stand_beside_others(model, policy):
    """An empty prompt and no new tokens: the row stays as it is."""
    expected = generate(model, [[8, MASK]], max_new_tokens=2, cache_policy=policy, **STRATEGY).sequences[0].tolist()
    sequences = generate(model, [[], [8, MASK]], max_new_tokens=2, cache_policy=policy, **STRATEGY).sequences
    assert sequences[1].tolist() == expected
    assert MASK not in sequences
