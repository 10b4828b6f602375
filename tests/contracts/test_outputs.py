"""What every family owes with every policy: what is shown, kept and returned of a call."""

import pytest

from ..builders import END, MASK, generate, generators, recorded, tiny_model
from .calls import SEEDED, STATIC

ROWS = [[5, 17, 33, 2, 8], [12]]


class Notes:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.fixture
def call(pair):
    """`call(rows, **options)` decodes with a family and a policy."""
    family, policy = pair
    return lambda rows, **options: generate(tiny_model(family), rows, cache_policy=policy, **{**STATIC, **options})


@pytest.mark.parametrize("row", [[5, 17, 33], [5, MASK, 17, MASK, 33]], ids=["new text", "infill"])
def test_what_a_stream_has_shown_is_what_is_returned(call, row):
    notes = Notes()
    output = call([row], max_new_tokens=7, eos_token_id=[], streamer=notes)
    assert notes.tokens == output.sequences[0].tolist() and notes.ended == 1


def test_a_streamer_changes_no_token(call):
    assert (
        call([[5, 17, 33]], max_new_tokens=7, streamer=Notes()).sequences.tolist()
        == call([[5, 17, 33]], max_new_tokens=7).sequences.tolist()
    )


def test_behind_an_end_of_sequence_stands_padding_alone(call):
    free = call(ROWS, max_new_tokens=9, eos_token_id=[]).sequences[:, 5:].tolist()
    ends = [free[0][2]]
    for row, whole in zip(call(ROWS, max_new_tokens=9, eos_token_id=ends).sequences[:, 5:].tolist(), free, strict=True):
        length = whole.index(ends[0]) + 1 if ends[0] in whole else 9
        if row[:length] == whole[:length]:  # else a later block, which now sees padding, says something else
            assert set(row[length:]) <= {END}


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(call, tokenizer):
    options = {"max_new_tokens": 9, "eos_token_id": [], "suppress_tokens": list(range(58, 64))}
    free = call([[5, 17, 33]], **options).sequences[0, 3:].tolist()
    stop = tokenizer.decode(free[:4])[1:]
    new = call([[5, 17, 33]], stop_strings=[stop], tokenizer=tokenizer, **options).sequences[0, 3:].tolist()
    texts = [tokenizer.decode(new[: index + 1]) for index in range(9)]
    found = [index for index, text in enumerate(texts) if stop in text]
    assert found and set(new[found[0] + 1 :]) <= {END}


def test_the_history_ends_with_the_sequences_and_only_fills_masks(call):
    output = call(ROWS, max_new_tokens=6, eos_token_id=[], output_history=True)
    assert output.history[-1].tolist() == output.sequences.tolist()
    for before, after in zip(output.history, output.history[1:]):
        changed = before != after
        assert (before[changed] == MASK).all() and (after[changed] != MASK).all()


def test_filling_takes_one_forward_pass_for_each_mask(call):
    row = [10, MASK, 12, 13, 14, MASK, MASK, 17, 18, 19]
    assert call([row], max_new_tokens=0).num_forward_passes == row.count(MASK)


def test_nothing_to_fill_makes_no_forward_pass(call):
    output = call([[1, 2, 3]], max_new_tokens=0)
    assert output.num_forward_passes == 0 and output.sequences.tolist() == [[1, 2, 3]]


def test_no_guidance_is_guidance_by_0(call):
    assert (
        call(ROWS, max_new_tokens=6, cfg_scale=0.0).sequences.tolist()
        == call(ROWS, max_new_tokens=6).sequences.tolist()
    )


def test_suppressed_tokens_are_not_in_the_text(call):
    common = call(ROWS, max_new_tokens=9, eos_token_id=[]).sequences[:, 5:].flatten().bincount().argmax().item()
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 9, "eos_token_id": [], "temperature": temperature}
        assert common not in call(ROWS, suppress_tokens=[common], **options).sequences[:, 5:]


def test_greedy_decoding_draws_no_number(call):
    [generator] = generators([3])
    before = generator.get_state()
    call([[5, 17, 33]], max_new_tokens=6, generator=[generator])
    assert generator.get_state().equal(before)


def test_hooks_that_change_nothing_change_nothing(call):
    options = {
        "generation_tokens_hook_func": lambda step, sequences, logits: sequences,
        "generation_logits_hook_func": lambda step, sequences, logits: logits,
    }
    plain, hooked = call(ROWS, max_new_tokens=6), call(ROWS, max_new_tokens=6, **options)
    assert hooked.sequences.tolist() == plain.sequences.tolist()
    assert hooked.num_forward_passes == plain.num_forward_passes


def test_more_denoising_steps_than_tokens_are_as_many_as_tokens(pair, call):
    family, _ = pair
    with recorded(tiny_model(family)) as calls:
        output = call([[5, 17, 33, 2]], max_new_tokens=4, block_length=4, denoising_steps=50, eos_token_id=[])
    assert output.num_forward_passes == len(calls) == 4


def test_one_denoising_step_fills_a_block_at_once(pair, call):
    output = call([[5, 17, 33, 2]], max_new_tokens=8, block_length=4, denoising_steps=1, eos_token_id=[])
    passes = 4 if pair[0] in SEEDED else 2
    assert output.num_forward_passes == passes and output.tokens_per_forward.tolist() == [8 / passes]
