"""End of sequence, padding after it, and stopping criteria."""

import pytest
import torch
from transformers import (
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

from ..builders import END, MASK, PAD, TURN_END, ScriptedModel, generate, left_pad, new_tokens, recorded, script

SPEECH = [1, 2, END, 4, 5, 6, 7, 8]


class EndsAt(StoppingCriteria):
    """Ends the rows whose sequence holds `token`."""

    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return (input_ids == self.token).any(-1)


def test_a_finished_block_with_an_end_of_sequence_ends_its_row_and_padding_follows():
    model = ScriptedModel(script(SPEECH))
    output = generate(model, [[]], max_new_tokens=8, block_length=4, pad_token_id=0)
    assert output.sequences.tolist() == [[1, 2, END, 0, 0, 0, 0, 0]]
    assert output.num_forward_passes == 4


def test_the_padding_is_the_models_pad_token_or_else_the_end_of_sequence():
    assert new_tokens(ScriptedModel(script(SPEECH)), [], max_new_tokens=5) == [1, 2, END, PAD, PAD]
    assert new_tokens(ScriptedModel(script(SPEECH), pad_token_id=9), [], max_new_tokens=5) == [1, 2, END, 9, 9]
    assert new_tokens(ScriptedModel(script(SPEECH), pad_token_id=None), [], max_new_tokens=5) == [1, 2, END, END, END]


def test_any_of_several_end_of_sequence_tokens_ends_a_row():
    model = ScriptedModel(script([1, TURN_END, 3, 4]))
    options = {"max_new_tokens": 4, "block_length": 2, "pad_token_id": 0}
    assert new_tokens(model, [], eos_token_id=[END, TURN_END], **options) == [1, TURN_END, 0, 0]


def test_rows_end_on_their_own():
    model = ScriptedModel(script([1, 2, END, 4, 5, 6, 7, 8, 9, 10]))
    sequences = generate(model, [[], [1, 2, 3]], max_new_tokens=6, block_length=2, pad_token_id=0).sequences
    assert sequences.tolist() == [[PAD] * 3 + [1, 2, END, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


def test_decoding_stops_when_every_row_has_ended():
    model = ScriptedModel(script([END] * 12))
    assert generate(model, [[], [1]], max_new_tokens=10, block_length=2).num_forward_passes == 2


@pytest.mark.parametrize("prompt", [[END], [END, 1, END], [1, END]])
def test_an_end_of_sequence_in_the_prompt_stops_nothing(policy, prompt):
    model = ScriptedModel(script([5] * 6, prompt=len(prompt)))
    assert new_tokens(model, prompt, max_new_tokens=6, block_length=2, cache_policy=policy) == [5] * 6


def test_padding_that_is_the_end_of_sequence_stops_nothing(policy):
    model = ScriptedModel(script([5] * 9))
    sequences = generate(model, [[], [1, 2, 3]], max_new_tokens=6, block_length=2, cache_policy=policy).sequences
    assert sequences[:, 3:].tolist() == [[5] * 6] * 2


def test_an_end_of_sequence_filled_into_the_prompt_stops_nothing(policy):
    """Only what is written after the prompt can end the answer."""
    model = ScriptedModel(script([1, END, 3, 4, 5]))
    assert generate(model, [[1, MASK]], max_new_tokens=3, cache_policy=policy).sequences.tolist() == [[1, END, 3, 4, 5]]


@pytest.mark.parametrize("number", [1, 3, 4, 7])
def test_the_output_is_as_wide_as_prompt_and_new_tokens(model, policy, number):
    inputs = left_pad([[1, 2, 3], [4]])
    assert model.diffusion_generate(**inputs, max_new_tokens=number, cache_policy=policy).shape == (2, 3 + number)
    assert model.diffusion_generate(**inputs, max_length=3 + number, cache_policy=policy).shape == (2, 3 + number)


def test_a_model_without_end_of_sequence_decodes_everything():
    model = ScriptedModel(script(SPEECH), eos_token_id=None, pad_token_id=None)
    assert new_tokens(model, [], max_new_tokens=8, block_length=2) == SPEECH


# --- criteria


def test_the_librarys_length_criterion_ends_after_the_block_that_reaches_it():
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6], prompt=2))
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=5)])
    options = {"max_new_tokens": 6, "block_length": 2, "pad_token_id": 0}
    assert new_tokens(model, [7, 8], stopping_criteria=criteria, **options) == [1, 2, 3, 4, 0, 0]


def test_the_librarys_time_criterion_ends_after_the_first_block():
    model = ScriptedModel(script([1] * 6))
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    assert generate(model, [[]], max_new_tokens=6, block_length=2, stopping_criteria=criteria).num_forward_passes == 2


def test_the_librarys_stop_strings_end_a_row_whose_block_ends_with_one(tokenizer):
    said = tokenizer("one. two. six.")["input_ids"]
    model = ScriptedModel(script(said))
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, ["."])])
    written = new_tokens(model, [], max_new_tokens=len(said), block_length=4, stopping_criteria=criteria)
    assert tokenizer.decode(written, skip_special_tokens=True) == "one."


def test_a_criterion_ends_only_the_rows_for_which_it_holds():
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6, 7, 8]))
    options = {"max_new_tokens": 6, "block_length": 2, "pad_token_id": 0}
    sequences = generate(model, [[], [9, 9]], stopping_criteria=StoppingCriteriaList([EndsAt(2)]), **options).sequences
    assert sequences[:, 2:].tolist() == [[1, 2, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8]]


def test_a_criterion_reads_no_mask():
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6, 7, 8]))
    criterion = EndsAt(3)
    rows = [[9, 9, 9, 9], [MASK, 9, 9, MASK]]
    generate(model, rows, max_new_tokens=4, block_length=2, stopping_criteria=StoppingCriteriaList([criterion]))
    assert criterion.seen
    for sequences in criterion.seen:
        assert MASK not in sequences


def test_a_criterion_ends_a_row_where_it_would_end_it_alone():
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6, 7, 8]))
    options = {"max_new_tokens": 4, "block_length": 2, "stopping_criteria": StoppingCriteriaList([EndsAt(5)])}
    rows = [[9, 9, 9, 9], [9, 9, 9, MASK]]
    alone = generate(model, rows[:1], **options).sequences[0]
    assert generate(model, rows, **options).sequences[0].tolist() == alone.tolist()


def test_a_criterion_that_holds_leaves_no_mask(model, policy):
    criteria = StoppingCriteriaList([lambda input_ids, scores, **kwargs: torch.ones(len(input_ids), dtype=torch.bool)])
    with recorded(model) as calls:
        output = generate(
            model,
            [[1, MASK, 3], [4]],
            max_new_tokens=8,
            block_length=2,
            stopping_criteria=criteria,
            cache_policy=policy,
        )
    assert MASK not in output.sequences
    assert len(calls) <= 3


def test_a_criterion_does_not_count_a_rows_padding():
    def ten_tokens(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    model = ScriptedModel(script([1] * 24))
    options = {"max_new_tokens": 12, "block_length": 4, "stopping_criteria": [ten_tokens], "pad_token_id": 0}
    alone = generate(model, [[1, 2, 3]], **options).sequences[0, 3:].tolist()
    beside = generate(model, [[1, 2, 3], [1] * 8], **options).sequences[0, 8:].tolist()
    assert alone == beside == [1] * 8 + [0] * 4


def at_once(input_ids, scores, **kwargs):
    return torch.ones(len(input_ids), dtype=torch.bool)


def test_behind_a_criterion_that_ends_a_row_in_the_middle_of_an_infill_stands_padding_alone(tokenizer, capsys):
    """The text that was given behind the first open position goes too, in the output and in the stream."""
    model = ScriptedModel(script(tokenizer("abcdefgh")["input_ids"]))
    rows = tokenizer("x<mask>y<mask>z")["input_ids"]
    options = {"max_new_tokens": 2, "block_length": 1, "stopping_criteria": [at_once], "pad_token_id": END}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    sequences = generate(model, [rows], streamer=streamer, **options).sequences[0]
    assert tokenizer.decode(sequences[:3]) == "xby"
    assert set(sequences[3:].tolist()) == {END}
    assert capsys.readouterr().out.strip() == "xby"


@pytest.mark.parametrize("end", [{"stopping_criteria": [at_once]}, {"eos_token_id": 2}], ids=["criterion", "end token"])
def test_a_hook_leaves_no_token_behind_the_end(tokenizer, capsys, end):
    """Neither one that fills later blocks when the row has ended, nor one that fills them before it begins."""

    def fill_the_rest(step, sequences, logits):
        if step is not None:
            sequences = sequences.clone()
            sequences[:, 4:] = 9
        return sequences

    model = ScriptedModel(script([1, 2, 3, 4, 5, 6, 7, 8]))
    options = {"max_new_tokens": 8, "block_length": 2, "pad_token_id": END, **end}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    written = new_tokens(model, [], generation_tokens_hook_func=fill_the_rest, streamer=streamer, **options)
    assert written == [1, 2] + 6 * [END]
    assert capsys.readouterr().out.strip() == tokenizer.decode([1, 2])


def test_an_end_that_a_hook_writes_ends_the_stream_and_the_output_alike(tokenizer, capsys):
    def fill(step, sequences, logits):
        return torch.tensor([[1, END, 3, 4]]) if step is None else sequences

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model = ScriptedModel(script([5, 6, 7, 8]))
    written = new_tokens(model, [], max_new_tokens=4, generation_tokens_hook_func=fill, streamer=streamer)
    assert written == [1, END, END, END]
    assert capsys.readouterr().out.strip() == tokenizer.decode([1])
