"""Input that is unusual but right."""

import pytest
import torch
from transformers.utils import logging

from dllm_hf import STRATEGIES

from ..builders import (
    END,
    MASK,
    POSITIONS,
    VOCAB,
    ScriptedModel,
    generate,
    generators,
    left_pad,
    new_model,
    new_tokens,
    script,
    tiny_model,
)

OPTIONS = {"max_new_tokens": 6, "remasking_strategy": "low_confidence_static"}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_token_ids_of_any_integer_type_give_the_same(model, dtype):
    ids = left_pad([[5, 6, 7], [8, 9, 10]])["input_ids"]
    expected = model.diffusion_generate(ids, **OPTIONS)
    assert model.diffusion_generate(ids.to(dtype), **OPTIONS).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_an_attention_mask_of_any_type_gives_the_same(model, dtype):
    inputs = left_pad([[5, 6, 7], [8]])
    expected = model.diffusion_generate(**inputs, **OPTIONS)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert model.diffusion_generate(**inputs, **OPTIONS).tolist() == expected.tolist()


def test_an_attention_mask_of_ones_is_none(model, policy):
    inputs = left_pad([[5, 6, 7]])
    expected = model.diffusion_generate(**inputs, cache_policy=policy, **OPTIONS)
    del inputs["attention_mask"]
    assert model.diffusion_generate(**inputs, cache_policy=policy, **OPTIONS).tolist() == expected.tolist()


def test_the_first_and_last_token_of_the_vocabulary_can_be_written_and_read(policy):
    model = ScriptedModel(script([0, VOCAB - 1], prompt=2))
    assert new_tokens(model, [0, VOCAB - 1], max_new_tokens=2, cache_policy=policy) == [0, VOCAB - 1]


def test_a_block_may_be_longer_than_the_canvas(model, policy):
    expected = new_tokens(model, [5, 6], block_length=6, cache_policy=policy, **OPTIONS)
    assert new_tokens(model, [5, 6], block_length=10**9, cache_policy=policy, **OPTIONS) == expected


@pytest.mark.parametrize("strategy", ["low_confidence_static", "maskgit_plus", "origin"])
def test_more_steps_than_tokens_give_a_token_a_step(model, strategy):
    generator = torch.Generator().manual_seed(0)
    options = {**OPTIONS, "remasking_strategy": strategy, "steps": 3000, "generator": generator}
    output = generate(model, [[5, 6]], **options)
    assert MASK not in output.sequences
    assert output.num_forward_passes <= 6


def test_the_canvas_may_fill_every_position_of_the_model(model, policy):
    prompt = [5] * (POSITIONS - 6)
    assert MASK not in new_tokens(model, prompt, cache_policy=policy, **OPTIONS)


def test_an_empty_prompt_starts_from_nothing(model, policy):
    ids = torch.zeros(2, 0, dtype=torch.long)
    for mask in (None, torch.zeros(2, 0, dtype=torch.long)):
        sequences = model.diffusion_generate(ids, attention_mask=mask, cache_policy=policy, **OPTIONS)
        assert sequences.shape == (2, 6)
        assert MASK not in sequences


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 50.0])
def test_no_mask_is_left_in_any_precision(family, policy, dtype, temperature):
    model = new_model(family).to(dtype)
    options = {**OPTIONS, "temperature": temperature, "cache_policy": policy, "cfg_scale": 0.5}
    assert MASK not in generate(model, [[5, 6, 7], []], **options).sequences


@pytest.mark.parametrize(
    "strategy", ["low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "factor", "topk_margin"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_leave_no_mask_and_no_endless_loop(strategy, value):
    model = ScriptedModel(torch.full((8, VOCAB), value))
    options = {**OPTIONS, "remasking_strategy": strategy}
    output = generate(model, [[5, 6], [7]], **options)
    assert MASK not in output.sequences
    assert output.num_forward_passes <= 6


def test_masks_in_the_padding_are_no_positions_to_fill(policy):
    model = ScriptedModel(script([1, 2, 3, 4, 5, 6, 7, 8]))
    inputs = left_pad([[9, 9], [9]], pad=MASK)
    options = {"max_new_tokens": 3, "cache_policy": policy}
    assert model.diffusion_generate(**inputs, **options)[:, 2:].tolist() == [[3, 4, 5], [2, 3, 4]]


def test_padding_after_the_end_is_never_the_mask():
    """A tokenizer without padding may offer the mask for it."""
    model = ScriptedModel(script([1, END, 3]))
    with pytest.raises(ValueError, match="`pad_token_id"):
        generate(model, [[]], max_new_tokens=3, pad_token_id=MASK)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_that_are_no_numbers_are_warned_of_once(strategy, caplog, monkeypatch):
    logger = logging.get_logger("dllm_hf.generation.canvas")
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.cache_clear()
    model = ScriptedModel(torch.full((8, VOCAB), torch.nan))
    for _ in range(2):
        generate(model, [[]], max_new_tokens=4, remasking_strategy=strategy)
    assert [record.message for record in caplog.records if "float16" in record.message].__len__() == 1


def test_logits_that_are_numbers_are_not_warned_of(model, policy, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("dllm_hf.generation.canvas"), "propagate", True)
    generate(model, [[1, 2], []], max_new_tokens=4, cache_policy=policy, temperature=0.7, top_k=2)
    assert not caplog.records


def test_a_row_that_makes_no_pass_in_a_step_is_not_taken_for_filled():
    """Dream's `origin` draws such steps, in which processors make the row idle in the pass of another one."""
    rows = [[7, 8, 54, 16, MASK], [15, MASK, 11, MASK, 56, 33, 43, 35, 39, MASK, 38, 12, MASK]]
    options = {"max_new_tokens": 2, "remasking_strategy": "origin", "repetition_penalty": 1.5, "eos_token_id": []}
    for seed in range(8):
        output = generate(tiny_model("sdar"), rows, generator=generators([seed, seed + 1]), **options)
        assert MASK not in output.sequences
