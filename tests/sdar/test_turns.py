"""Keys and values go back in part: what is computed again in a chat begins where the text differs.

What holds for every family is in tests/contracts/test_turns.py.
"""

import pytest

from ..builders import MASK, generate, recorded
from ..contracts.calls import STATIC, columns_fed, span, texts

TURN = {"max_new_tokens": 8, "denoising_steps": 2, "eos_token_id": [], **STATIC}


def columns_of_the_first_pass(model, row, cache, **options) -> list[int]:
    with recorded(model) as calls:
        generate(model, [row], past_key_values=cache, **{**TURN, **options})
    [columns] = columns_fed(calls)[0]
    return columns


@pytest.mark.parametrize("edited", [0, 2, 5, 8, 11])
def test_an_edited_history_is_computed_again_from_the_edit_on(model, edited):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    text[edited] = 55
    assert columns_of_the_first_pass(model, [*text, 50], output.past_key_values)[0] == edited // 4 * 4


def test_the_same_prompt_again_computes_its_last_block_alone(model):
    output = generate(model, [span(1, 14)], **TURN)
    before = output.sequences.tolist()
    assert columns_of_the_first_pass(model, span(1, 14), output.past_key_values) == span(12, 16)
    again = generate(model, [span(1, 14)], past_key_values=output.past_key_values, **TURN)
    assert again.sequences.tolist() == before


def test_masks_inside_the_old_text_are_filled_from_the_cache(model):
    rows = [span(1, 18)]
    output = generate(model, rows, **TURN)
    [text] = texts(rows, output)
    text[9] = text[10] = MASK
    assert columns_of_the_first_pass(model, text, output.past_key_values, max_new_tokens=0) == span(8, 12)


def test_the_cache_of_another_block_length_is_refused(model):
    cache = generate(model, [[1, 2, 3]], **TURN).past_key_values
    with recorded(model) as calls, pytest.raises(ValueError, match="past_key_values.*blocks of 4.*block_length=8"):
        generate(model, [[1, 2, 3]], past_key_values=cache, block_length=8, **TURN)
    assert not calls


def test_a_cache_refused_for_its_block_length_can_still_be_used(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    following = [[*texts(rows, output)[0], 50]]
    with pytest.raises(ValueError, match="block_length=8"):
        generate(model, following, past_key_values=output.past_key_values, block_length=8, **TURN)
    resumed = generate(model, following, past_key_values=output.past_key_values, **TURN)
    assert resumed.sequences.tolist() == generate(model, following, **TURN).sequences.tolist()
