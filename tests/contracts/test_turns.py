"""A chat goes on from the cache of the turn before: only what is new is computed, and nothing else changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

from ..builders import END, MASK, generate, recorded
from .calls import (
    BLOCK_FAMILIES,
    EXAMPLES,
    STATIC,
    UNSEEDED,
    assert_cache_is_final,
    columns_fed,
    models,
    prompts,
    span,
    texts,
    tokens,
)

TURN = {"max_new_tokens": 8, "denoising_steps": 2, "eos_token_id": [], **STATIC}
ROWS = [span(1, 14)]


def until(row: list[int], ends: list[int], start: int) -> list[int]:
    """The text up to and with its first end after the prompt."""
    return next((row[: index + 1] for index in range(start, len(row)) if row[index] in ends), row)


def assert_fresh(model, output, rows, **options):
    """Going on from `output` gives what a call without a cache gives. Returns the output."""
    expected = generate(model, rows, **options)
    resumed = generate(model, rows, past_key_values=output.past_key_values, **options)
    assert resumed.sequences.tolist() == expected.sequences.tolist()
    cache = resumed.past_key_values
    assert cache is output.past_key_values
    lengths = zip(cache.final_lengths, expected.past_key_values.final_lengths, strict=True)
    assert all(kept >= fresh for kept, fresh in lengths)
    block_length = options.get("block_length")
    assert_cache_is_final(model, cache, **({"block_size": block_length} if block_length else {}))
    return resumed


def first_turn(model, rows=ROWS, **options):
    """The output of a turn, and each row's text."""
    output = generate(model, rows, **{**TURN, **options})
    return output, texts(rows, output)


@pytest.mark.parametrize("family", BLOCK_FAMILIES)
@settings(max_examples=EXAMPLES // 4)
@given(data=st.data())
def test_several_turns_of_ragged_rows_give_what_fresh_calls_give(family, data):
    """Answers end early, histories are edited, cut short, or get masks put into them."""
    model, block_length = data.draw(models(family))
    options = {
        **block_length,
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
            change = data.draw(st.sampled_from(["goes on", "goes on", "edited", "cut", "masked"]))
            where = data.draw(st.integers(0, len(text) - 1)) if text else 0
            if change == "edited" and text:
                text[where] = data.draw(tokens)
            elif change == "masked" and text:
                text[where] = MASK
            elif change == "cut":
                text = text[:where]
            following.append(text + (data.draw(prompts) if change != "cut" else []))
        rows = following
        number = data.draw(st.integers(0 if all(rows) else 1, 9))
        output = assert_fresh(model, output, rows, max_new_tokens=number, **options)


# --- what is computed


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_second_turn_computes_only_what_is_new(model):
    rows = [span(1, 22), span(30, 40)]
    output, answered = first_turn(model, rows)
    following = [text + [50, 51, 52] for text in answered]
    with recorded(model) as calls:
        resumed = generate(model, following, past_key_values=output.past_key_values, **TURN)
    # From the first turn's last block, which is not final, to the end of the first block with masks.
    assert columns_fed(calls)[0] == [span(28, 36), span(16, 24)]
    assert all(call["input_ids"].shape[1] <= 8 for call in calls)
    assert resumed.num_forward_passes == len(calls)
    assert_fresh(model, generate(model, rows, **TURN), following, **TURN)


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_long_second_prompt_is_computed_in_pieces_from_where_the_cache_ends(model):
    rows, options = [span(1, 14), [3]], {**TURN, "prefill_chunk_size": 4}
    output, answered = first_turn(model, rows, **options)
    following = [text + span(20, 39) for text in answered]
    assert_fresh(model, output, following, **options)
    output = generate(model, rows, **options)
    with recorded(model) as calls:
        generate(model, following, past_key_values=output.past_key_values, **options)
    assert min(call["position_ids"][0].min() for call in calls) == 20
    assert max(call["input_ids"].shape[1] for call in calls) == 8


@pytest.mark.parametrize("kind", UNSEEDED)
def test_an_edit_of_one_row_leaves_the_others_their_cache(model):
    rows = [span(1, 14), span(20, 33)]
    output, (one, other) = first_turn(model, rows)
    one[0] = 55
    with recorded(model) as calls:
        generate(model, [one, other], past_key_values=output.past_key_values, **TURN)
    assert [columns[0] for columns in columns_fed(calls)[0]] == [0, 20]
    assert_fresh(model, generate(model, rows, **TURN), [one, other], **TURN)


def test_nothing_to_fill_in_a_second_turn_makes_no_forward_pass_and_spoils_nothing(model):
    output, [text] = first_turn(model)
    final = list(output.past_key_values.final_lengths)
    nothing = generate(model, [text], past_key_values=output.past_key_values, **{**TURN, "max_new_tokens": 0})
    assert nothing.num_forward_passes == 0
    assert nothing.sequences.tolist() == [text]
    assert nothing.past_key_values.final_lengths == final
    assert_fresh(model, nothing, [text + [50]], **TURN)


# --- rows


def test_a_second_turn_of_a_ragged_batch_gives_what_a_fresh_call_gives(model):
    rows = [span(1, 22), [5], [], span(30, 40)]
    output, answered = first_turn(model, rows)
    assert_fresh(model, output, [text + [50, 51, 52] for text in answered], **TURN)


def test_rows_of_different_numbers_of_blocks_are_all_there_in_the_next_turn(model):
    """The row that has fewer blocks waits for the others."""
    rows, options = [[1], [1, 2, 3, 4], [MASK, *span(5, 16)]], {**TURN, "max_new_tokens": 4}
    output, answered = first_turn(model, rows, **options)
    assert_fresh(model, output, [text + [50, 51, 52] for text in answered], **options)


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_row_that_waits_keeps_its_cache(model):
    """Nothing is written over it while the other row's blocks are decoded."""
    rows = [[*span(1, 20), MASK], [MASK, *span(2, 9), MASK, *span(10, 17), MASK]]
    output, _ = first_turn(model, rows, max_new_tokens=0)
    assert output.past_key_values.final_lengths == [16, 16]
    assert_cache_is_final(model, output.past_key_values)


def test_rows_without_a_mask_ride_along(model):
    rows = [span(1, 18), span(20, 37)]
    _, (one, other) = first_turn(model, rows)
    other[21] = MASK
    for following in ([one[:12], other], [one[:20], other[:22]], [other, one]):
        assert_fresh(model, generate(model, rows, **TURN), following, **{**TURN, "max_new_tokens": 0})


def test_turns_of_several_returned_sequences(model):
    options = {**TURN, "temperature": 1.0, "num_return_sequences": 2}
    output = generate(model, [span(1, 8), [3]], **options)
    rows = [sequence[start:] + [50] for sequence, start in zip(output.sequences.tolist(), (0, 0, 6, 6), strict=True)]
    assert_fresh(model, output, rows, **TURN)


def test_two_chats_can_go_on_from_copies_of_a_turn(model):
    output, [text] = first_turn(model)
    other = copy.copy(output)
    other.past_key_values = copy.deepcopy(output.past_key_values)
    assert_fresh(model, output, [text + [50]], **TURN)
    assert_fresh(model, other, [text + [51]], **TURN)


# --- texts that are not what was decoded


@pytest.mark.parametrize("index", [0, 3, 6])
def test_an_answer_that_ended_early_is_gone_on_from(model, index):
    rows = [[1, 2, 3], span(10, 21)]
    free = generate(model, rows, **TURN).sequences
    options = {**TURN, "eos_token_id": [int(free[0, 11 + index])]}
    output, answered = first_turn(model, rows, **options)
    cut = [until(text, options["eos_token_id"], len(row)) for row, text in zip(rows, answered, strict=True)]
    assert_fresh(model, output, [text + [50, 51, 52, 53] for text in cut], **options)


@pytest.mark.parametrize("edited", [0, 5, 11, 19, 20])
def test_an_edited_history_gives_what_a_fresh_call_gives(model, edited):
    output, [text] = first_turn(model)
    text[edited] = 55
    assert_fresh(model, output, [text + [50]], **TURN)


def test_masks_inside_the_old_text_are_filled(model):
    _, [text] = first_turn(model, [span(1, 18)])
    text[9] = text[10] = MASK
    for number in (0, 8):
        output = generate(model, [span(1, 18)], **TURN)
        resumed = assert_fresh(model, output, [text], **{**TURN, "max_new_tokens": number})
        assert MASK not in resumed.sequences


@pytest.mark.parametrize("length", [1, 4, 7, 8, 13])
def test_a_prompt_shorter_than_the_last_one_is_gone_on_from(model, length):
    output, _ = first_turn(model)
    shorter = [ROWS[0][:length]]
    resumed = assert_fresh(model, output, shorter, **TURN)
    assert_fresh(model, resumed, [texts(shorter, resumed)[0] + [7, 8]], **TURN)


def test_a_history_that_was_edited_can_be_taken_back(model):
    """The cache then holds the edited one."""
    output, [text] = first_turn(model)
    second = assert_fresh(model, output, [[55, *text[1:], 50]], **TURN)
    assert_fresh(model, second, [text + [50]], **TURN)


def test_a_history_can_be_taken_back_after_a_turn_that_did_not_return_the_cache(model):
    output, [text] = first_turn(model)
    edited = torch.tensor([[*range(40, 53), *text[13:], 50]])
    model.diffusion_generate(edited, past_key_values=output.past_key_values, **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


def test_a_first_turn_with_nothing_to_fill_can_be_gone_on_from(model):
    output, [text] = first_turn(model, max_new_tokens=0)
    assert text == ROWS[0]
    assert_fresh(model, output, [text + [50]], **TURN)


# --- turns that fail


@pytest.mark.parametrize("fails_at", range(4))
@pytest.mark.parametrize("same_history", [True, False])
def test_a_turn_that_fails_in_the_middle_spoils_nothing(model, same_history, fails_at):
    """Nobody knows how far the cache has got: during the prompt's pieces, or during a block."""
    rows = [span(1, 14), span(20, 37)]
    output, answered = first_turn(model, rows)
    following = [text + span(50, 59) for text in answered]
    passes = []

    def fail(module, args):
        passes.append(module)
        if len(passes) == fails_at + 1:
            raise RuntimeError("out of memory")

    tried = following if same_history else [[40, *text[1:]] for text in following]
    handle = model.model.layers[1].register_forward_pre_hook(fail)  # the first layer's cache has moved on
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, tried, past_key_values=output.past_key_values, **TURN, prefill_chunk_size=4)
    finally:
        handle.remove()
    assert_fresh(model, output, following, **TURN)


def test_a_turn_whose_hook_fails_spoils_nothing(model):
    output, [text] = first_turn(model)

    def fail(step, sequences, logits):
        if step == 1:
            raise RuntimeError("stop")
        return logits

    edited = [[*range(40, 53), *text[13:], 50]]
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, edited, past_key_values=output.past_key_values, generation_logits_hook_func=fail, **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


def test_a_turn_that_is_interrupted_spoils_nothing(model):
    output, [text] = first_turn(model)

    class Interrupts(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return scores

    with pytest.raises(KeyboardInterrupt):
        generate(model, [text + [50]], past_key_values=output.past_key_values, logits_processor=[Interrupts()], **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


def test_a_turn_whose_streamer_fails_spoils_nothing(model):
    output, [text] = first_turn(model)

    class Fails:
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 2:
                raise OSError("no space left")

        def end(self):
            pass

    with pytest.raises(OSError, match="no space left"):
        generate(model, [text + [50]], past_key_values=output.past_key_values, streamer=Fails(), **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


# --- hooks


@pytest.mark.parametrize("hook_at", [None, 0, 2])
def test_a_hook_that_changes_the_old_text_makes_it_computed_again(model, hook_at):
    rows = [span(1, 14), span(20, 31)]
    output, answered = first_turn(model, rows)

    def rewrite(step, sequences, logits):
        sequences = sequences.clone()
        if step == hook_at:
            sequences[:, 4:8] = 50
        return sequences

    following = [text + [50] for text in answered]
    second = assert_fresh(model, output, following, generation_tokens_hook_func=rewrite, **TURN)
    assert_fresh(model, second, [text + [51] for text in texts(following, second)], **TURN)


def test_a_hook_that_changes_the_old_text_at_each_step_changes_nothing_between_cache_and_none(model):
    output, [text] = first_turn(model)

    def rewrite(step, sequences, logits):
        sequences = sequences.clone()
        sequences[:, :4] = 50
        return sequences

    assert_fresh(model, output, [text + [50]], generation_tokens_hook_func=rewrite, **TURN)


def test_what_a_hook_changes_in_a_finished_block_is_known_to_the_next_turn(model):
    def rewrite(step, sequences, logits):
        sequences = sequences.clone()
        sequences[:, :4] = 50 if step == 2 else sequences[:, :4]
        return sequences

    output, [text] = first_turn(model, generation_tokens_hook_func=rewrite)
    assert text[:4] == [50] * 4
    assert_fresh(model, output, [text + [50]], **TURN)


def test_a_history_that_is_padded_where_a_hook_ended_it_is_not_taken_for_what_was_decoded(model):
    """The end stands in a finished block: what was decoded after it is in the cache, padding in the sequences."""
    rows, options = [span(1, 4)], {**TURN, "max_new_tokens": 17, "eos_token_id": [END]}

    def ends(step, sequences, logits):
        sequences = sequences.clone()
        if step == 5:
            sequences[:, 6] = END
        return sequences

    output, [text] = first_turn(model, rows, generation_tokens_hook_func=ends, **options)
    assert text[7:] == [END] * 13
    assert_fresh(model, output, [text + [50]], **options)


def test_a_bfloat16_model_goes_on_from_its_cache(fresh):
    model = fresh.to(torch.bfloat16)
    output, [text] = first_turn(model)
    resumed = generate(model, [text + [50]], past_key_values=output.past_key_values, **TURN)
    assert MASK not in resumed.sequences
    assert resumed.sequences[0, : len(text)].tolist() == text
