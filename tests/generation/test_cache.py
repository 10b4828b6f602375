"""What each policy feeds, how many forward passes are made, and which rows reach the head."""

import pytest
import torch

from dllm_hf.generation import cache as cache_module
from dllm_hf.generation.cache import CanvasCache
from dllm_hf.generation.window import Frame, make_window

from ..builders import MASK, ScriptedModel, generate, new_tokens, recorded, script, tiny_model

PROMPT, NUMBER, BLOCK = 5, 8, 4
CANVAS = PROMPT + NUMBER


def windows(model, policy, **options):
    """The columns fed to each forward pass for a prompt of 5 and two blocks of 4, two steps each."""
    options = {"max_new_tokens": NUMBER, "block_length": BLOCK, "denoising_steps": 2, **options}
    options = {"remasking_strategy": "low_confidence_static", "cache_policy": policy, **options}
    with recorded(model) as calls:
        generate(model, [list(range(PROMPT))], **options)
    return [call["position_ids"][0].tolist() for call in calls]


def test_none_feeds_the_canvas_at_each_step(model):
    assert windows(model, "none") == [list(range(CANVAS))] * 4


def test_prefix_feeds_the_block_and_everything_after_it(model):
    shift, canvas = model.logits_shift, list(range(CANVAS))
    assert windows(model, "prefix") == [canvas, canvas[5 - shift :], canvas, canvas[9 - shift :]]


def test_dual_feeds_the_block_alone(model):
    shift, canvas = model.logits_shift, list(range(CANVAS))
    assert windows(model, "dual") == [canvas, canvas[5 - shift : 9], canvas, canvas[9 - shift : 13]]


@pytest.mark.parametrize("number, block_length", [(8, 4), (7, 4), (3, 8), (6, None)])
def test_logits_are_computed_for_the_rows_of_the_block_only(model, policy, number, block_length):
    with recorded(model.lm_head) as seen:
        generate(model, [[1, 2, 3], [4]], max_new_tokens=number, block_length=block_length, cache_policy=policy)
    block_length = block_length or model.default_block_length or number
    for hidden_states in seen:
        # Rows that are done take no part in the passes of the other.
        assert hidden_states.shape[0] in (1, 2)
        assert hidden_states.shape[1] in (min(block_length, number), number % block_length)


def test_a_block_of_one_step_is_the_same_in_every_policy(model):
    """Its only step feeds the whole canvas, so nothing is old."""
    options = {"max_new_tokens": 12, "block_length": 4, "denoising_steps": 1, "remasking_strategy": "sequential"}
    outputs = [new_tokens(model, [5, 6, 7], cache_policy=policy, **options) for policy in ("none", "prefix", "dual")]
    assert outputs[0] == outputs[1] == outputs[2]


def test_prefix_is_exact_where_nothing_stands_before_the_block(model):
    options = {"max_new_tokens": 8, "block_length": 8, "remasking_strategy": "sequential"}
    assert new_tokens(model, [], cache_policy="prefix", **options) == new_tokens(model, [], **options)


def test_the_number_of_forward_passes_is_the_number_of_calls(model, policy):
    for options in (
        {},
        {"steps": 5},
        {"denoising_steps": 9},
        {"cfg_scale": 1.0},
        {"remasking_strategy": "entropy", "steps": 30},
    ):
        with recorded(model) as calls:
            output = generate(model, [[1, 2, 3], []], max_new_tokens=9, block_length=4, cache_policy=policy, **options)
        assert output.num_forward_passes == len(calls)


@pytest.mark.parametrize("strategy", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_a_step_whose_quota_is_0_makes_no_forward_pass(strategy):
    model = ScriptedModel(script([1, 2, 3, 4]))
    generator = torch.Generator().manual_seed(0)
    options = {"remasking_strategy": strategy, "steps": 40, "generator": generator, "output_history": True}
    output = generate(model, [[]], max_new_tokens=4, **options)

    changes = torch.stack([torch.full((1, 4), MASK), *output.history]).diff(dim=0).any(-1)
    assert len(output.history) == 40 or strategy == "origin"
    assert output.num_forward_passes == len(model.fed) == changes.sum() <= 4


def test_nothing_to_fill_makes_no_forward_pass(model, policy):
    output = generate(model, [[1, 2, 3]], max_new_tokens=0, cache_policy=policy)
    assert output.num_forward_passes == 0
    assert output.sequences.tolist() == [[1, 2, 3]]
    assert output.tokens_per_forward.tolist() == [0]


def test_adaptive_strategies_stop_when_the_block_is_full():
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6], 30.0))
    for options in ({"threshold": 0.9}, {"factor": 1.0}, {"entropy_bound": 5.0}):
        output = generate(model, [[]], max_new_tokens=6, block_length=3, **options)
        assert output.num_forward_passes == 2
        assert output.tokens_per_forward.tolist() == [3]


def test_tokens_per_forward_are_those_of_the_row():
    model = ScriptedModel(script([1] * 9))
    output = generate(model, [[MASK], [1]], max_new_tokens=4, block_length=4, denoising_steps=2)
    assert output.num_forward_passes == 3  # blocks (0, 1) and (1, 5) in one row, (1, 5) in the other, side by side
    torch.testing.assert_close(output.tokens_per_forward, torch.tensor([5 / 3, 2.0]))


def test_a_canvas_cache_writes_columns_in_place_and_returns_everything():
    cache = CanvasCache(tiny_model("llada"), width=4)
    everything = torch.arange(4.0).view(1, 1, 4, 1)
    keys, _ = cache.update(everything, everything, 0)
    cache.set_window(make_window([Frame(1, 3, 1, 3, 4, 4, 1, 0)], [0], 1, 4, 0, 0))
    again, values = cache.update(torch.tensor([[[[10.0], [20.0]]]]), torch.tensor([[[[-1.0], [-2.0]]]]), 0)
    assert again.data_ptr() == keys.data_ptr()
    assert again.flatten().tolist() == [0, 10, 20, 3]
    assert values.flatten().tolist() == [0, -1, -2, 3]


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_columns_of_an_arena_move_piece_by_piece(at_once, monkeypatch):
    """Sources and targets overlap, and a piece may reach from one extent into the next."""
    monkeypatch.setattr(cache_module, "MOVED_AT_ONCE", at_once)
    model = tiny_model("sdar")
    cache = model.make_cache(20)
    cache.use_arena(4, 60, model.device)
    for layer in cache.layers:
        nothing = torch.empty(1, 2, 0, 12)
        layer.lazy_initialization(nothing, nothing)
        layer.keys.normal_(), layer.values.normal_()
    before = [tensor.clone() for tensor in cache.layer_tensors()]
    cache.extents._move([(12, 10, 7), (20, 17, 5), (40, 22, 9)])
    for old, new in zip(before, cache.layer_tensors()):
        assert torch.equal(new[:, :, 10:31], torch.cat([old[:, :, 12:19], old[:, :, 20:25], old[:, :, 40:49]], dim=2))
        assert torch.equal(new[:, :, :10], old[:, :, :10]) and torch.equal(new[:, :, 31:], old[:, :, 31:])
