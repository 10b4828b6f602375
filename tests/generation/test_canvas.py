"""The canvas, its grid of blocks, and how steps are spread over them."""

import pytest
import torch

from dllm_hf import DiffusionGenerationConfig
from dllm_hf.generation.canvas import Canvas
from dllm_hf.generation.hooks import Hooks, Session
from dllm_hf.generation.requests import Request, Row

from ..builders import MASK, ScriptedModel, generate, left_pad, script


def make_row(prompt, number, block_length=4, block_grid="prompt", slot=0):
    options = DiffusionGenerationConfig(
        block_length=block_length, mask_token_id=MASK, remasking_strategy="low_confidence", cache_policy="none"
    )
    return Row(Request(prompt, number, options), slot, block_grid, False, 0)


def spans(row):
    return [part.span for part in row.blocks]


def make_session(prompts, number, **hooks):
    rows = [make_row(prompt, number, slot=slot) for slot, prompt in enumerate(prompts)]
    canvas = Canvas(len(rows), max(row.length for row in rows), torch.device("cpu"))
    canvas.load(rows)
    return Session(Hooks(**hooks), canvas, left_pad(prompts)["input_ids"], rows, None)


@pytest.mark.parametrize(
    "row, number, block_length, expected",
    [
        ([1, 2, 3], 8, 4, [(3, 7), (7, 11)]),
        ([1, 2, 3], 6, 4, [(3, 7), (7, 9)]),
        ([1, 2, 3], 2, 8, [(3, 5)]),
        ([], 5, 4, [(0, 4), (4, 5)]),
        ([1, 2, 3], 6, None, [(3, 9)]),
        ([1, MASK, 3, 4, 5, MASK, 7], 4, 4, [(0, 3), (3, 7), (7, 11)]),
        ([MASK, 2, 3, 4, 5, 6, 7, 8, 9], 2, 4, [(0, 1), (9, 11)]),
        ([1, MASK, 3, MASK], 2, None, [(1, 6)]),
        ([1, 2], 0, 4, []),
    ],
)
def test_blocks_are_cells_with_masks_of_a_grid_that_starts_at_the_prompts_end(row, number, block_length, expected):
    assert spans(make_row(row, number, block_length)) == expected


def test_a_grid_at_0_fills_its_last_cell_and_shows_what_was_asked_for():
    row = make_row([1, 2, 3], 3, block_grid="zero")
    assert spans(row) == [(0, 4), (4, 8)]
    assert (row.shown, row.length) == (6, 8)


def test_what_comes_in_goes_out_in_the_same_layout():
    prompts = [[1, 2, 3], [4], []]
    sequences = make_session(prompts, 2).sequences()
    assert sequences[:, :3].tolist() == left_pad(prompts)["input_ids"].tolist()
    assert (sequences[:, 3:] == MASK).all()


def test_what_a_hook_changed_comes_back_to_its_column():
    def change(step, sequences, logits):
        return torch.cat([sequences[:, :3], torch.tensor([[10, 11], [12, 13]])], dim=1)

    session = make_session([[1, 2, 3], [4]], 2, tokens=change)
    session.run_tokens_hook(change, None)
    assert session.sequences().tolist() == [
        [1, 2, 3, 10, 11],
        [*left_pad([[1, 2, 3], [4]])["input_ids"][1].tolist(), 12, 13],
    ]
    assert session.canvas.tokens[1, :3].tolist() == [4, 12, 13]


@pytest.mark.parametrize(
    "steps, expected", [(3, [2, 1, 1]), (4, [2, 1, 1]), (6, [2, 2, 2]), (7, [3, 2, 2]), (1, [1, 1, 1])]
)
def test_steps_are_spread_over_the_blocks_the_remainder_on_the_first(steps, expected):
    model = ScriptedModel(script([1] * 12))
    expected = [steps // 3 + (block < steps % 3) or 1 for block in range(3)]
    generate(model, [[]], max_new_tokens=12, block_length=4, steps=steps)
    first_masks = [min((ids[0] == MASK).nonzero().flatten().tolist()) // 4 for ids in model.fed]
    assert [first_masks.count(block) for block in range(3)] == expected


def test_denoising_steps_are_those_of_each_block():
    model = ScriptedModel(script([1] * 12))
    assert generate(model, [[]], max_new_tokens=12, block_length=4, denoising_steps=2).num_forward_passes == 6


def test_without_a_number_of_steps_each_step_transfers_one_token():
    model = ScriptedModel(script([1] * 12))
    assert generate(model, [[]], max_new_tokens=12, block_length=5).num_forward_passes == 12
