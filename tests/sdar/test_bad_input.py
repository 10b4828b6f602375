"""What cannot be done is a `ValueError` that says so, before any forward pass."""

import pytest
import torch

from ..builders import MASK, POSITIONS, generate, new_model, recorded, sdar_config, sdar_moe_config

TOKENS = torch.tensor([[1, 2, MASK, 4, 5, MASK]])
LABELS = torch.where(TOKENS == MASK, 7, -100)


def config(family, **changes):
    return (sdar_config if family == "sdar" else sdar_moe_config)(**changes)


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_a_block_length_below_1_is_refused(model, length):
    with recorded(model) as calls, pytest.raises(ValueError, match="block_length"):
        generate(model, [[1, 2]], max_new_tokens=4, block_length=length)
    assert not calls


@pytest.mark.parametrize("size", [0, -4])
def test_a_block_size_below_1_is_refused_in_the_configuration(family, size):
    with pytest.raises(ValueError, match=f"block_size={size}"):
        config(family, block_size=size)


def test_a_block_size_of_another_type_is_refused_in_the_configuration(family):
    with pytest.raises(Exception, match="block_size"):
        config(family, block_size="four")


@pytest.mark.parametrize("size", [0, -1, 2.0, "4"])
def test_a_block_size_below_1_is_refused_by_forward(family, size):
    model = new_model(family)
    for kwargs in ({}, {"labels": LABELS}):
        with pytest.raises(ValueError, match="block_size"):
            model(input_ids=TOKENS, block_size=size, **kwargs)


def test_a_block_size_below_1_is_refused_by_the_stack_without_the_head(family):
    with pytest.raises(ValueError, match="block_size"):
        new_model(family).model(input_ids=TOKENS, block_size=0)


def test_a_sliding_window_is_refused(family):
    with pytest.raises(ValueError, match="use_sliding_window"):
        config(family, use_sliding_window=True, sliding_window=8)


@pytest.mark.parametrize("positions", [[0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 2, 1], [3, 2, 0, 1, 2, 3]])
@pytest.mark.parametrize("kwargs", [{}, {"labels": LABELS}], ids=["forward", "training"])
def test_positions_that_go_backwards_inside_a_sample_are_refused(model, positions, kwargs):
    with pytest.raises(ValueError, match="position_ids.*backwards"):
        model(input_ids=TOKENS, position_ids=torch.tensor([positions]), **kwargs)


def test_labels_of_another_shape_are_refused(model):
    for labels in (LABELS[:, :-1], LABELS[0], LABELS.repeat(2, 1)):
        with pytest.raises(ValueError, match="labels.*same shape"):
            model(input_ids=TOKENS, labels=labels)


def test_labels_without_tokens_are_refused(family):
    model = new_model(family)
    with pytest.raises(ValueError, match="labels.*input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(TOKENS), labels=LABELS)


def test_labels_with_a_4d_mask_are_refused(model):
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=TOKENS, labels=LABELS, attention_mask=torch.zeros(1, 1, 6, 6))


def test_a_mask_ratio_of_another_shape_is_refused(family):
    with pytest.raises(ValueError, match="mask_ratio"):
        new_model(family)(input_ids=TOKENS, labels=LABELS, mask_ratio=torch.ones(3))


def test_a_canvas_longer_than_the_model_is_refused(model):
    with recorded(model) as calls, pytest.raises(ValueError, match=f"{POSITIONS} positions.*max_new_tokens"):
        generate(model, [[1, 2, 3]], max_new_tokens=POSITIONS - 2)
    assert not calls


def test_a_canvas_that_only_whole_blocks_make_too_long_is_refused_and_the_message_says_why(family):
    model = new_model(family, max_position_embeddings=30)
    assert generate(model, [[1, 2, 3]], max_new_tokens=25).sequences.shape == (1, 28)
    with recorded(model) as calls, pytest.raises(ValueError, match="32 positions.*block_length=4.*30 positions"):
        generate(model, [[1, 2, 3]], max_new_tokens=27)
    assert not calls
    assert generate(model, [[1, 2, 3]], max_new_tokens=27, block_length=3).sequences.shape == (1, 30)


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_approximate_caches_are_not_offered(model, policy):
    with pytest.raises(ValueError, match="cache_policy.*choose one of block, none"):
        generate(model, [[1, 2]], max_new_tokens=4, cache_policy=policy)


@pytest.mark.parametrize("size", [0, -3])
def test_a_piece_below_one_token_is_refused(model, size):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, [[1, 2]], max_new_tokens=4, prefill_chunk_size=size)


def test_steps_for_all_and_for_each_block_are_refused_together(model):
    with pytest.raises(ValueError, match="steps.*denoising_steps"):
        generate(model, [[1, 2]], max_new_tokens=4, steps=3, denoising_steps=2)


def test_an_empty_prompt_with_nothing_to_add_is_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, [[], []], max_new_tokens=0)
