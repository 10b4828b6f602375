"""A chat goes on from the cache of the turn before: only what is new is computed, and nothing else changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

from ..builders import END, MASK, VOCAB, generate, new_model, recorded, tiny_model
from .conftest import models

TURN = {"max_new_tokens": 8, "denoising_steps": 2, "eos_token_id": [], "remasking_strategy": "low_confidence_static"}


def span(start: int, end: int) -> list[int]:
    return list(range(start, end))


def texts(rows, output) -> list[list[int]]:
    """Each row's prompt and answer without the padding."""
    width = max(map(len, rows))
    return [sequence[width - len(row) :] for sequence, row in zip(output.sequences.tolist(), rows, strict=True)]


def until(row: list[int], ends: list[int], start: int) -> list[int]:
    """The text up to and with its first end after the prompt."""
    return next((row[: index + 1] for index in range(start, len(row)) if row[index] in ends), row)


@torch.no_grad()
def assert_holds_final_states(model, cache):
    """The states are those that one forward pass over the tokens that they stand for leaves."""
    for row, written in enumerate(cache.final_lengths):
        if not written:
            continue
        ids, positions = cache.tokens[row : row + 1, :written], torch.arange(written)[None]
        fresh = model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
        for kept, expected in zip(cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(kept.state[row], expected.state[0], atol=1e-3, rtol=1e-3)
        if model.logits_shift:
            torch.testing.assert_close(cache.last_hidden[row], fresh.last_hidden[0], atol=1e-3, rtol=1e-3)


def assert_fresh(model, output, rows, **options):
    """Going on from `output` gives what a call without a cache gives. Returns the output."""
    expected = generate(model, rows, **options)
    resumed = generate(model, rows, past_key_values=output.past_key_values, **options)
    assert resumed.sequences.tolist() == expected.sequences.tolist()
    assert resumed.past_key_values is output.past_key_values
    assert_holds_final_states(model, resumed.past_key_values)
    return resumed


def first_columns(calls) -> list[list[int]]:
    return [list(dict.fromkeys(row)) for row in calls[0]["position_ids"].tolist()]


tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, tokens, tokens, st.just(MASK)), max_size=9)


@settings(max_examples=15)
@given(data=st.data())
def test_several_turns_of_ragged_rows_give_what_fresh_calls_give(data):
    """Answers end early, histories are edited, cut short, or get masks put into them."""
    model = tiny_model("gla_dream", **data.draw(models))
    options = {
        **TURN,
        "eos_token_id": data.draw(st.sampled_from([[], [END, *range(8)]])),
        "prefill_chunk_size": data.draw(st.sampled_from([3, 2048])),
    }
    rows = data.draw(st.lists(prompts, min_size=1, max_size=3))
    output = generate(model, rows, **{**options, "max_new_tokens": data.draw(st.integers(1, 9))})
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
        output = assert_fresh(model, output, rows, **{**options, "max_new_tokens": number})


def test_a_second_turn_computes_only_what_is_new(model):
    rows = [span(1, 22), span(30, 40)]
    output = generate(model, rows, **TURN)
    following = [text + [50, 51, 52] for text in texts(rows, output)]
    with recorded(model) as calls:
        generate(model, following, past_key_values=output.past_key_values, **TURN)
    # From the first turn's last block, which did not go into the state, to the end of the first block with masks.
    assert first_columns(calls) == [span(28, 36), span(16, 24)]
    assert all(call["input_ids"].shape[1] <= 8 for call in calls)
    assert_fresh(model, generate(model, rows, **TURN), following, **TURN)


@pytest.mark.parametrize("edited, first", [(0, 0), (19, 0), (20, 20), (21, 20)])
def test_an_edit_of_what_is_in_the_state_starts_the_row_anew(model, edited, first):
    rows = [span(1, 15)]
    output = generate(model, rows, **TURN)  # 22 columns, of which 20 are in the state
    [text] = texts(rows, output)
    text[edited] = 55
    with recorded(model) as calls:
        generate(model, [text + [50]], past_key_values=output.past_key_values, **TURN)
    assert first_columns(calls)[0][0] == first
    assert_fresh(model, generate(model, rows, **TURN), [text + [50]], **TURN)


def test_an_edit_of_one_row_leaves_the_others_their_state(model):
    rows = [span(1, 14), span(20, 33)]
    output = generate(model, rows, **TURN)
    one, other = texts(rows, output)
    one[0] = 55
    with recorded(model) as calls:
        generate(model, [one, other], past_key_values=output.past_key_values, **TURN)
    assert [columns[0] for columns in first_columns(calls)] == [0, 20]
    assert_fresh(model, generate(model, rows, **TURN), [one, other], **TURN)


def test_a_history_that_was_edited_can_be_taken_back(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    second = assert_fresh(model, output, [[55, *text[1:], 50]], **TURN)
    assert_fresh(model, second, [text + [50]], **TURN)


def test_a_history_can_be_taken_back_after_a_turn_that_did_not_return_the_cache(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    edited = torch.tensor([[*range(40, 53), *text[13:], 50]])
    model.diffusion_generate(edited, past_key_values=output.past_key_values, **TURN)
    assert_fresh(model, output, [text + [50]], **TURN)


@pytest.mark.parametrize("fails_at", range(4))
@pytest.mark.parametrize("same_history", [True, False])
def test_a_turn_that_fails_in_the_middle_spoils_nothing(model, same_history, fails_at):
    """Nobody knows how far the state has moved on: during the prompt's pieces, or during a block."""
    rows = [span(1, 14), span(20, 37)]
    output = generate(model, rows, **TURN)
    following = [text + span(50, 59) for text in texts(rows, output)]
    passes = []

    def fail(module, args):
        passes.append(module)
        if len(passes) == fails_at + 1:
            raise RuntimeError("out of memory")

    tried = following if same_history else [[40, *text[1:]] for text in following]
    handle = model.model.layers[1].register_forward_pre_hook(fail)  # the first layer's state has moved on
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tried, past_key_values=output.past_key_values, **TURN, prefill_chunk_size=4)
    handle.remove()
    assert_fresh(model, output, following, **TURN)


def test_a_turn_that_is_interrupted_spoils_nothing(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)

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


@pytest.mark.parametrize("hook_at", [None, 0, 2])
def test_a_hook_that_changes_the_old_text_makes_it_computed_again(model, hook_at):
    rows = [span(1, 14), span(20, 31)]
    output = generate(model, rows, **TURN)

    def rewrite(step, sequences, logits):
        sequences = sequences.clone()
        if step == hook_at:
            sequences[:, 4:8] = 50
        return sequences

    following = [text + [50] for text in texts(rows, output)]
    second = assert_fresh(model, output, following, generation_tokens_hook_func=rewrite, **TURN)
    assert_fresh(model, second, [text + [51] for text in texts(following, second)], **TURN)


def test_a_history_that_is_padded_where_a_hook_ended_it_is_not_taken_for_what_was_decoded(model):
    """The end stands in a finished block: what was decoded after it is in the state, padding in the sequences."""
    rows, options = [span(1, 4)], {**TURN, "max_new_tokens": 17, "eos_token_id": [END]}

    def ends(step, sequences, logits):
        sequences = sequences.clone()
        if step == 5:
            sequences[:, 6] = END
        return sequences

    output = generate(model, rows, generation_tokens_hook_func=ends, **options)
    [text] = texts(rows, output)
    assert text[7:] == [END] * 13
    assert_fresh(model, output, [text + [50]], **options)


@torch.no_grad()
def test_what_a_call_without_the_loop_adds_to_the_state_is_not_taken_for_the_text(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    added = {"input_ids": torch.tensor([span(40, 48)]), "position_ids": torch.arange(20, 28)[None]}
    model(**added, past_key_values=output.past_key_values)
    assert_fresh(model, output, [text + [50]], **TURN)


def test_nothing_to_fill_in_a_second_turn_makes_no_forward_pass_and_spoils_nothing(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    written = list(output.past_key_values.final_lengths)
    nothing = generate(model, [text], past_key_values=output.past_key_values, **{**TURN, "max_new_tokens": 0})
    assert nothing.num_forward_passes == 0
    assert nothing.sequences.tolist() == [text]
    assert nothing.past_key_values.final_lengths == written
    assert_fresh(model, nothing, [text + [50]], **TURN)


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


def test_a_chat_can_go_on_with_some_of_its_rows(model):
    rows = [span(1, 14), [3], span(20, 31)]
    output = generate(model, rows, **TURN)
    following = [text + [50] for text in texts(rows, output)]
    output.past_key_values.batch_select_indices(torch.tensor([2, 0]))
    assert_fresh(model, output, [following[2], following[0]], **TURN)


def test_a_bfloat16_model_goes_on_from_its_cache():
    model = new_model("gla_dream").to(torch.bfloat16)
    output = generate(model, [span(1, 14)], **TURN)
    resumed = generate(model, [span(1, 14) + [50]], past_key_values=output.past_key_values, **TURN)
    assert MASK not in resumed.sequences


def test_the_cache_of_another_dtype_is_refused():
    model = new_model("gla_dream")
    output = generate(model, [[1, 2, 3]], **TURN)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="past_key_values.*float32.*bfloat16"):
        generate(model, [[1, 2, 3]], past_key_values=output.past_key_values, **TURN)


def test_the_cache_of_another_batch_size_is_refused(model):
    output = generate(model, [[1, 2, 3], [4]], **TURN)
    with pytest.raises(ValueError, match="past_key_values.*holds 2 rows, but the batch has 1"):
        generate(model, [[1, 2, 3]], past_key_values=output.past_key_values, **TURN)
