"""Where a row stops in a family that decodes in blocks of its own, and what is shown of its last block."""

import pytest

from ..builders import END, generate, new_tokens, recorded
from .calls import BLOCK_MODELS, STATIC, UNSEEDED, span


def test_any_of_several_tokens_ends_a_row(model):
    free = new_tokens(model, [1, 2], max_new_tokens=12, eos_token_id=[], **STATIC)
    for index in (1, 6):
        ends = [free[index], 59]
        first = min(free.index(end) for end in ends if end in free)
        row = new_tokens(model, [1, 2], max_new_tokens=12, eos_token_id=ends, **STATIC)
        assert row == free[: first + 1] + [END] * (12 - first - 1)


def test_no_end_in_the_prompt_or_in_its_remainder_stops_a_row(model):
    """The remainder shares its block with the first new tokens."""
    prompt = [END, 5, 6, 7, 8, END, 59]
    free = new_tokens(model, prompt, max_new_tokens=9, eos_token_id=[], suppress_tokens=[END, 59], **STATIC)
    row = new_tokens(model, prompt, max_new_tokens=9, eos_token_id=[END, 59], suppress_tokens=[END, 59], **STATIC)
    assert row == free
    assert not {END, 59} & set(row)


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_row_that_has_ended_is_not_decoded_further(model):
    free = new_tokens(model, [1, 2, 3, 4], max_new_tokens=24, eos_token_id=[], **STATIC)
    index = free.index(free[5])
    output = generate(model, [[1, 2, 3, 4]], max_new_tokens=24, eos_token_id=[free[5]], **STATIC)
    assert output.num_forward_passes == (index // 4 + 1) * 4


# The blocks of Nemotron-Labs-Diffusion begin at the prompt's end, and its last one ends with the text.
@pytest.mark.parametrize("kind", [kind for kind in BLOCK_MODELS if kind != "nemotron_diffusion"])
@pytest.mark.parametrize("number", range(1, 10))
def test_whole_blocks_are_decoded_and_the_output_cut(model, number):
    prompt = [1, 2, 3]
    with recorded(model) as calls:
        output = generate(model, [prompt], max_new_tokens=number, block_length=4, eos_token_id=[], **STATIC)
    whole = -(-(3 + number) // 4) * 4
    if not model.seeds_blocks:
        assert calls[-1]["position_ids"].max() == whole - 1
    assert output.sequences.shape == (1, 3 + number)
    longer = generate(model, [prompt], max_new_tokens=whole - 3, block_length=4, eos_token_id=[], **STATIC).sequences
    assert output.sequences.tolist() == longer[:, : 3 + number].tolist()


def test_an_end_beyond_the_cut_is_not_shown_and_pads_nothing(model):
    free = new_tokens(model, [1, 2, 3], max_new_tokens=5, eos_token_id=[], **STATIC)
    cut = new_tokens(model, [1, 2, 3], max_new_tokens=4, eos_token_id=[free[4]], **STATIC)
    shown = free[:4]
    first = shown.index(free[4]) if free[4] in shown else 3
    assert cut == shown[: first + 1] + [END] * (3 - first)


def test_a_streamer_gets_the_prompt_and_then_each_block_once(model):
    class Sink:
        def __init__(self):
            self.pieces, self.drafts = [], []

        def put(self, tokens):
            self.pieces.append(tokens.tolist())

        def put_draft(self, tokens):
            self.drafts.append(len(tokens))

        def end(self):
            self.pieces.append("end")

    sink = Sink()
    options = {"max_new_tokens": 7, "eos_token_id": [], **STATIC}
    output = generate(model, [span(1, 7)], streamer=sink, **options)
    row = output.sequences[0].tolist()
    if model.seeds_blocks:  # a block's first token is final before its others
        cuts = (0, 6, 8, 9, 12, 13) if model.block_grid == "zero" else (0, 6, 7, 10, 11, 13)
        assert sink.pieces == [*(row[start:end] for start, end in zip(cuts, cuts[1:])), "end"]
        return
    assert sink.pieces == [row[:6], row[6:8], row[8:12], row[12:13], "end"]
    assert sink.drafts[:6] == [2] * 2 + [4] * 4
    assert set(sink.drafts[6:]) == {1} and len(sink.drafts) <= 10
