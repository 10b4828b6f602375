"""A chat goes on from the cache of the turn before: only what is new is computed, and nothing else changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from ..builders import END, MASK, VOCAB, generate, new_model, recorded, tiny_model
from .conftest import SDAR_FAMILIES

STATIC = {"remasking_strategy": "low_confidence_static", "cache_policy": "block"}
TURN = {"max_new_tokens": 8, "block_length": 4, "denoising_steps": 2, "eos_token_id": [], **STATIC}


def span(start: int, end: int) -> list[int]:
    return list(range(start, end))


def texts(rows, output) -> list[list[int]]:
    """Each row's prompt and answer without the padding."""
    width = max(map(len, rows))
    return [sequence[width - len(row) :] for sequence, row in zip(output.sequences.tolist(), rows, strict=True)]


def until(row: list[int], ends: list[int], start: int) -> list[int]:
    """The text up to and with its first end after the prompt."""
    for index in range(start, len(row)):
        if row[index] in ends:
            return row[: index + 1]
    return row


@torch.no_grad()
def assert_holds_final_keys(model, cache, block_length):
    """What the cache says it holds is what one forward pass over the tokens gives."""
    for row, written in enumerate(cache.final_lengths):
        if not written:
            continue
        fresh = model(
            input_ids=cache.tokens[row : row + 1, :written],
            position_ids=torch.arange(written)[None],
            use_cache=True,
            block_size=block_length,
        ).past_key_values
        for kept, expected in zip(cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(kept.keys[row, :, :written], expected.keys[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(kept.values[row, :, :written], expected.values[0], atol=1e-4, rtol=1e-4)


def assert_fresh(model, output, rows, **options):
    """Going on from `output` gives what a call without a cache gives. Returns the output."""
    expected = generate(model, rows, **options)
    resumed = generate(model, rows, past_key_values=output.past_key_values, **options)
    assert resumed.sequences.tolist() == expected.sequences.tolist()
    cache = resumed.past_key_values
    assert all(
        kept >= fresh for kept, fresh in zip(cache.final_lengths, expected.past_key_values.final_lengths, strict=True)
    )
    assert_holds_final_keys(model, cache, options["block_length"])
    return resumed


def first_columns(calls) -> list[list[int]]:
    return [list(dict.fromkeys(row)) for row in calls[0]["position_ids"].tolist()]


tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, tokens, tokens, st.just(MASK)), max_size=9)


@pytest.mark.parametrize("family", SDAR_FAMILIES)
@settings(max_examples=12)
@given(data=st.data())
def test_several_turns_of_ragged_rows_give_what_fresh_calls_give(family, data):
    """Answers end early, histories are edited, cut short, or get masks put into them."""
    model = tiny_model(family)
    options = {
        "block_length": data.draw(st.sampled_from([1, 3, 4, 8])),
        "eos_token_id": data.draw(st.sampled_from([[], [END, *range(8)]])),
        "prefill_chunk_size": data.draw(st.sampled_from([3, 2048])),
        "denoising_steps": data.draw(st.sampled_from([None, 2])),
        **STATIC,
    }
    rows = data.draw(st.lists(prompts, min_size=1, max_size=3))
    output = generate(model, rows, max_new_tokens=data.draw(st.integers(1, 9)), **options)
    for _ in range(2):
        following = []
        for row, text in zip(rows, texts(rows, output), strict=True):
            text = until(text, options["eos_token_id"], len(row))
            kind = data.draw(st.sampled_from(["goes on", "goes on", "edited", "cut", "masked"]))
            where = data.draw(st.integers(0, len(text) - 1)) if text else 0
            if kind == "edited" and text:
                text[where] = data.draw(tokens)
            elif kind == "masked" and text:
                text[where] = MASK
            elif kind == "cut":
                text = text[:where]
            following.append(text + (data.draw(prompts) if kind != "cut" else []))
        rows = following
        number = data.draw(st.integers(0 if all(rows) else 1, 9))
        output = assert_fresh(model, output, rows, max_new_tokens=number, **options)


def test_a_second_turn_computes_only_what_is_new(model):
    rows = [span(1, 22), span(30, 40)]
    output = generate(model, rows, **TURN)
    following = [text + [50, 51, 52] for text in texts(rows, output)]
    with recorded(model) as calls:
        resumed = generate(model, following, past_key_values=output.past_key_values, **TURN)
    # From the first turn's last block, whose keys nobody wrote, to the end of the first block with masks.
    assert first_columns(calls) == [span(28, 36), span(16, 24)]
    assert all(call["input_ids"].shape[1] <= 8 for call in calls)
    assert resumed.num_forward_passes == len(calls)
    assert resumed.past_key_values is output.past_key_values


def test_a_second_turn_of_a_ragged_batch_gives_what_a_fresh_call_gives(model):
    rows = [span(1, 22), [5], [], span(30, 40)]
    output = generate(model, rows, **TURN)
    assert_fresh(model, output, [text + [50, 51, 52] for text in texts(rows, output)], **TURN)


def test_rows_of_different_numbers_of_blocks_are_all_there_in_the_next_turn(model):
    """The row that has fewer blocks waits for the others."""
    rows = [[1], [1, 2, 3, 4], [MASK, *span(5, 16)]]
    options = {**TURN, "max_new_tokens": 4}
    output = generate(model, rows, **options)
    assert_fresh(model, output, [text + [50, 51, 52] for text in texts(rows, output)], **options)


def test_a_row_that_waits_keeps_its_keys(model):
    """Nothing is written over them while the other row's blocks are decoded."""
    rows = [[*span(1, 20), MASK], [MASK, *span(2, 9), MASK, *span(10, 17), MASK]]
    output = generate(model, rows, **{**TURN, "max_new_tokens": 0})
    assert output.past_key_values.final_lengths == [16, 16]
    assert_holds_final_keys(model, output.past_key_values, 4)


@pytest.mark.parametrize("index", [0, 3, 6])
def test_an_answer_that_ended_early_is_gone_on_from(model, index):
    rows = [[1, 2, 3], span(10, 21)]
    free = generate(model, rows, **TURN).sequences
    ends = [int(free[0, 11 + index])]
    options = {**TURN, "eos_token_id": ends}
    output = generate(model, rows, **options)
    following = [
        until(text, ends, len(row)) + [50, 51, 52, 53] for row, text in zip(rows, texts(rows, output), strict=True)
    ]
    assert_fresh(model, output, following, **options)


@pytest.mark.parametrize("edited", [0, 2, 5, 8, 11])
def test_an_edited_history_is_computed_again_from_the_edit_on(model, edited):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    text[edited] = 55
    with recorded(model) as calls:
        generate(model, [text + [50]], past_key_values=output.past_key_values, **TURN)
    assert first_columns(calls)[0][0] == edited // 4 * 4
    assert_fresh(model, generate(model, rows, **TURN), [text + [50]], **TURN)


def test_a_history_that_was_edited_can_be_taken_back(model):
    """The cache then holds the edited one."""
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    edited = [55, *text[1:], 50]
    second = generate(model, [edited], past_key_values=output.past_key_values, **TURN)
    assert_fresh(model, second, [text + [50]], **TURN)


def test_a_history_can_be_taken_back_after_a_turn_that_did_not_return_the_cache(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    edited = torch.tensor([[*range(40, 53), *text[13:], 50]])
    model.diffusion_generate(edited, past_key_values=output.past_key_values, **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


def test_a_history_can_be_taken_back_after_a_turn_that_failed(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)

    def fail(step, sequences, logits):
        if step == 1:
            raise RuntimeError("stop")
        return logits

    with pytest.raises(RuntimeError, match="stop"):
        edited = [[*range(40, 53), *text[13:], 50]]
        generate(model, edited, past_key_values=output.past_key_values, generation_logits_hook_func=fail, **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


def test_a_history_can_be_taken_back_after_a_turn_whose_stream_failed_while_reading_the_prompt(model):
    """A long prompt is computed in pieces: the first are written when the next one fails."""
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    passes = []

    def fail(module, args, kwargs):
        passes.append(module)
        if len(passes) == 3:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            edited = [[*range(40, 53), *text[13:], 50]]
            generate(model, edited, past_key_values=output.past_key_values, **{**TURN, "prefill_chunk_size": 4})
    finally:
        handle.remove()
    assert_fresh(model, output, [text + [50]], **TURN)


@pytest.mark.parametrize("length", [1, 4, 7, 8, 13])
def test_a_prompt_shorter_than_the_last_one_is_gone_on_from(model, length):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    resumed = assert_fresh(model, output, [span(1, 14)[:length]], **TURN)
    assert_fresh(model, resumed, [texts([span(1, 14)[:length]], resumed)[0] + [7, 8]], **TURN)


def test_the_same_prompt_again_computes_its_last_block_alone(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    with recorded(model) as calls:
        again = generate(model, rows, past_key_values=output.past_key_values, **TURN)
    assert first_columns(calls) == [span(12, 16)]
    assert again.sequences.tolist() == output.sequences.tolist()


def test_masks_inside_the_old_text_are_filled_from_the_cache(model):
    rows = [span(1, 18)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    text[9] = text[10] = MASK
    with recorded(model) as calls:
        generate(model, [text], past_key_values=output.past_key_values, **{**TURN, "max_new_tokens": 0})
    assert first_columns(calls) == [span(8, 12)]
    assert_fresh(model, generate(model, rows, **TURN), [text], **{**TURN, "max_new_tokens": 0})
    assert_fresh(model, generate(model, rows, **TURN), [text], **TURN)


def test_rows_without_a_mask_ride_along(model):
    rows = [span(1, 18), span(20, 37)]
    output = generate(model, rows, **TURN)
    one, other = texts(rows, output)
    other[21] = MASK
    for prompts in ([one[:12], other], [one[:20], other[:22]], [other, one]):
        assert_fresh(model, generate(model, rows, **TURN), prompts, **{**TURN, "max_new_tokens": 0})


def test_a_hook_that_changes_the_old_text_makes_it_computed_again(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)

    def rewrite(step, sequences, logits):
        sequences = sequences.clone()
        sequences[:, :4] = 50
        return sequences

    assert_fresh(model, output, [text + [50]], generation_tokens_hook_func=rewrite, **TURN)


def test_what_a_hook_changes_in_a_finished_block_is_known_to_the_next_turn(model):
    rows = [span(1, 14)]

    def rewrite(step, sequences, logits):
        sequences = sequences.clone()
        sequences[:, :4] = 50 if step == 2 else sequences[:, :4]
        return sequences

    output = generate(model, rows, generation_tokens_hook_func=rewrite, **TURN)
    assert_fresh(model, output, [texts(rows, output)[0] + [50]], **TURN)


def test_nothing_to_fill_in_a_second_turn_makes_no_forward_pass_and_spoils_nothing(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    nothing = generate(model, [text], past_key_values=output.past_key_values, **{**TURN, "max_new_tokens": 0})
    assert nothing.num_forward_passes == 0
    assert nothing.sequences.tolist() == [text]
    assert_fresh(model, nothing, [text + [50]], **TURN)


def test_a_first_turn_with_nothing_to_fill_can_be_gone_on_from(model):
    output = generate(model, [span(1, 14)], **{**TURN, "max_new_tokens": 0})
    assert_fresh(model, output, [span(1, 14) + [50]], **TURN)


def test_a_long_second_prompt_is_computed_in_pieces_from_where_the_cache_ends(model):
    rows = [span(1, 14), [3]]
    options = {**TURN, "prefill_chunk_size": 4}
    output = generate(model, rows, **options)
    following = [text + span(20, 39) for text in texts(rows, output)]
    assert_fresh(model, output, following, **options)
    output = generate(model, rows, **options)
    with recorded(model) as calls:
        generate(model, following, past_key_values=output.past_key_values, **options)
    assert min(call["position_ids"][0].min() for call in calls) == 20
    assert max(call["input_ids"].shape[1] for call in calls) == 8


def test_turns_of_several_returned_sequences(model):
    options = {**TURN, "temperature": 1.0, "num_return_sequences": 2}
    output = generate(model, [span(1, 8), [3]], **options)
    rows = [sequence[start:] + [50] for sequence, start in zip(output.sequences.tolist(), (0, 0, 6, 6), strict=True)]
    assert_fresh(model, output, rows, **TURN)


def test_two_chats_can_go_on_from_copies_of_a_turn(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    other = copy.copy(output)
    other.past_key_values = copy.deepcopy(output.past_key_values)
    assert_fresh(model, output, [text + [50]], **TURN)
    assert_fresh(model, other, [text + [51]], **TURN)


def test_the_cache_is_returned_only_where_it_can_be_used_again(model):
    rows = [[1, 2, 3]]
    assert generate(model, rows, **TURN).past_key_values is not None
    assert generate(model, rows, **{**TURN, "cache_policy": "none"}).past_key_values is None
    assert generate(model, rows, **{**TURN, "cfg_scale": 0.5}).past_key_values is None


# --- caches that cannot serve


@pytest.fixture
def fresh(family):
    return new_model(family)


def refused(model, rows, cache, match, **options):
    with recorded(model) as calls, pytest.raises(ValueError, match=match):
        generate(model, rows, past_key_values=cache, **{**TURN, **options})
    assert not calls


def test_the_cache_of_another_model_is_refused(family, fresh):
    output = generate(new_model(family), [[1, 2, 3]], **TURN)
    refused(fresh, [[1, 2, 3]], output.past_key_values, "past_key_values.*this model")


def test_the_cache_of_a_model_that_is_gone_is_refused(family, fresh):
    cache = generate(new_model(family), [[1, 2, 3]], **TURN).past_key_values
    refused(fresh, [[1, 2, 3]], cache, "past_key_values.*this model")


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[1, 2, 3]] * 3])
def test_the_cache_of_another_batch_size_is_refused(model, rows):
    output = generate(model, [[1, 2, 3], [4]], **TURN)
    refused(model, rows, output.past_key_values, "past_key_values.*holds 2 rows")


def test_the_cache_of_another_dtype_is_refused(fresh):
    output = generate(fresh, [[1, 2, 3]], **TURN)
    fresh.to(torch.bfloat16)
    refused(fresh, [[1, 2, 3]], output.past_key_values, "past_key_values.*float32.*bfloat16")


def test_the_cache_of_another_block_length_is_refused(model):
    output = generate(model, [[1, 2, 3]], **TURN)
    refused(model, [[1, 2, 3]], output.past_key_values, "past_key_values.*blocks of 4.*block_length=8", block_length=8)


@pytest.mark.parametrize("cache", [DynamicCache(), ((torch.zeros(1),),)], ids=["DynamicCache", "tuple"])
def test_a_cache_of_another_kind_is_refused(model, cache):
    refused(model, [[1, 2, 3]], cache, "past_key_values")


def test_a_cache_is_refused_where_nothing_is_cached(model):
    output = generate(model, [[1, 2, 3]], **TURN)
    refused(model, [[1, 2, 3]], output.past_key_values, "past_key_values.*cache_policy", cache_policy="none")


def test_a_cache_is_refused_under_guidance(model):
    output = generate(model, [[1, 2, 3]], **TURN)
    refused(model, [[1, 2, 3]], output.past_key_values, "cfg_scale.*past_key_values", cfg_scale=0.5)


def test_a_refused_cache_can_still_be_used(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    refused(model, [text], output.past_key_values, "past_key_values", block_length=8)
    assert_fresh(model, output, [text + [50]], **TURN)
