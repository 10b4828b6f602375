"""A state cannot go back in part: a chat whose history changed in it starts the row anew.

What holds for every family is in tests/contracts/test_turns.py.
"""

import pytest
import torch

from ..builders import generate, recorded
from ..contracts.calls import STATIC, assert_cache_is_final, columns_fed, span, texts

TURN = {"max_new_tokens": 8, "denoising_steps": 2, "eos_token_id": [], **STATIC}


@pytest.mark.parametrize("edited, first", [(0, 0), (19, 0), (20, 20), (21, 20)])
def test_an_edit_of_what_is_in_the_state_starts_the_row_anew(model, edited, first):
    rows = [span(1, 15)]
    output = generate(model, rows, **TURN)  # 22 columns, of which 20 are in the state
    [text] = texts(rows, output)
    text[edited] = 55
    with recorded(model) as calls:
        generate(model, [[*text, 50]], past_key_values=output.past_key_values, **TURN)
    [columns] = columns_fed(calls)[0]
    assert columns[0] == first


def test_a_shorter_prompt_than_what_is_in_the_state_starts_the_row_anew(model):
    cache = generate(model, [span(1, 15)], **TURN).past_key_values
    with recorded(model) as calls:
        generate(model, [span(1, 9)], past_key_values=cache, **TURN)
    assert columns_fed(calls)[0][0][0] == 0


@torch.no_grad()
def test_what_a_call_without_the_loop_adds_to_the_state_is_not_taken_for_the_text(model):
    rows = [span(1, 14)]
    output = generate(model, rows, **TURN)
    following = [[*texts(rows, output)[0], 50]]
    added = {"input_ids": torch.tensor([span(40, 48)]), "position_ids": torch.arange(20, 28)[None]}
    model(**added, past_key_values=output.past_key_values)
    resumed = generate(model, following, past_key_values=output.past_key_values, **TURN)
    assert resumed.sequences.tolist() == generate(model, following, **TURN).sequences.tolist()
    assert_cache_is_final(model, resumed.past_key_values)
