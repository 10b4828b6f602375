"""What a returned cache owes to a conversation, whatever the family keeps in it."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..builders import MASK, generate, new_model, tiny_model
from .calls import BLOCK_FAMILIES, STATIC, texts

OPTIONS = {"max_new_tokens": 6, "eos_token_id": [], **STATIC}
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 2, 3]]


def first_turn(model, rows=ROWS):
    """The output of a turn, and the prompts of the next one."""
    output = generate(model, rows, **OPTIONS)
    return output, [[*text, 20, 21] for text in texts(rows, output)]


def assert_goes_on(model, cache, rows):
    resumed = generate(model, rows, past_key_values=cache, **OPTIONS)
    assert resumed.sequences.tolist() == generate(model, rows, **OPTIONS).sequences.tolist()
    return resumed


def test_a_cache_that_was_reset_begins_anew(model):
    output, following = first_turn(model)
    output.past_key_values.reset()
    assert_goes_on(model, output.past_key_values, following)


def test_a_cache_that_was_reset_takes_another_number_of_rows(model):
    output, following = first_turn(model)
    output.past_key_values.reset()
    assert_goes_on(model, output.past_key_values, [*following, [4]])


def test_an_empty_cache_may_be_given_to_the_first_turn(model):
    cache = model.make_cache(8)
    output = assert_goes_on(model, cache, ROWS)
    assert output.past_key_values is cache


@pytest.mark.parametrize("indices", [[1], [1, 0], [0, 0, 1]], ids=str)
@pytest.mark.parametrize("select", ["batch_select_indices", "reorder_cache"])
def test_a_conversation_goes_on_with_some_of_its_rows_in_another_order(model, select, indices):
    output, following = first_turn(model)
    getattr(output.past_key_values, select)(torch.tensor(indices))
    assert_goes_on(model, output.past_key_values, [following[index] for index in indices])


def test_a_conversation_goes_on_in_several_ways(model):
    output, following = first_turn(model)
    output.past_key_values.batch_repeat_interleave(2)
    rows = [following[0], [*following[0], 3], following[1], [*following[1], 4]]
    assert_goes_on(model, output.past_key_values, rows)


@pytest.mark.parametrize("removed", [0, 1, 6, 40])
def test_a_cropped_cache_of_keys_and_values_goes_on_from_what_is_left(removed):
    model = tiny_model("sdar")
    output, following = first_turn(model)
    output.past_key_values.crop(removed)
    assert max(output.past_key_values.final_lengths) <= max(15 - removed, 0)
    assert_goes_on(model, output.past_key_values, following)


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_an_output_is_saved_and_the_conversation_goes_on_from_what_is_read(model, save):
    output, following = first_turn(model)
    file = io.BytesIO()
    save(output, file)
    file.seek(0)
    read = torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert torch.equal(read.sequences, output.sequences)
    resumed = assert_goes_on(model, read.past_key_values, following)
    assert resumed.num_forward_passes < generate(model, following, prefill_chunk_size=4, **OPTIONS).num_forward_passes


def test_a_saved_conversation_goes_on_with_the_same_weights_and_not_with_others(fresh):
    output, following = first_turn(fresh)
    read = pickle.loads(pickle.dumps(output.past_key_values))
    with torch.no_grad():
        other = copy.deepcopy(fresh)
        other.lm_head.weight.add_(1.0)
    assert_goes_on(copy.deepcopy(fresh), read, following)
    with pytest.raises(ValueError, match="does not come from a call of this model"):
        generate(other, following, past_key_values=read, **OPTIONS)


@pytest.mark.parametrize("family", BLOCK_FAMILIES)
def test_a_saved_conversation_goes_on_in_a_model_that_has_just_been_loaded(family, tmp_path):
    new_model(family).save_pretrained(tmp_path)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    output, following = first_turn(one)
    read = pickle.loads(pickle.dumps(output.past_key_values))
    assert_goes_on(other, read, following)


def test_what_stands_behind_the_asked_tokens_costs_no_forward_pass():
    """Blocks of 32, of which 4 positions are asked for: whatever is filled behind them would be cut away."""
    for family in ("sdar", "gla_dream"):
        model = new_model(family, block_size=32)
        for rows in ([[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8, 9]]):
            options = {**OPTIONS, "max_new_tokens": 4, "remasking_strategy": "sequential"}
            for policy in ("block", "none"):
                assert generate(model, rows, cache_policy=policy, **options).num_forward_passes == 4


@pytest.mark.parametrize("family", [family for family in BLOCK_FAMILIES if family != "nemotron_diffusion"])
def test_not_decoding_them_changes_no_token(family):
    """Each prefix of a longer answer is what a shorter call gives in the same block, where that reaches behind it."""
    model = new_model(family, block_size=16)
    rows = [[1, 2, 3], [4, 5], [6, MASK, 7]]
    whole = generate(model, rows, max_new_tokens=13, eos_token_id=[]).sequences
    for number in (1, 4, 9):
        output = generate(model, rows, max_new_tokens=number, eos_token_id=[])
        assert output.sequences.tolist() == whole[:, : 3 + number].tolist()
        assert MASK not in output.sequences
        for index, row in enumerate(rows):
            alone = generate(model, [row], max_new_tokens=number, eos_token_id=[])
            assert alone.sequences[0].tolist() == output.sequences[index, 3 - len(row) :].tolist()
            assert alone.tokens_per_forward[0] == output.tokens_per_forward[index]
