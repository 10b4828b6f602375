"""A cache that cannot serve a call is refused before any forward pass, with a message that says why."""

import pytest
import torch
from transformers import DynamicCache

from ..builders import generate, new_model, recorded
from .calls import BLOCK_MODELS, STATIC, span

TURN = {"max_new_tokens": 8, "denoising_steps": 2, "eos_token_id": [], **STATIC}
ROWS = [[1, 2, 3]]


def refused(model, rows, cache, match, **options):
    with recorded(model) as calls, pytest.raises(ValueError, match=match):
        generate(model, rows, past_key_values=cache, **{**TURN, **options})
    assert not calls


def test_the_cache_is_returned_only_where_it_can_be_used_again(model):
    assert generate(model, ROWS, **TURN).past_key_values is not None
    assert generate(model, ROWS, **{**TURN, "cache_policy": "none"}).past_key_values is None
    assert generate(model, ROWS, **{**TURN, "cfg_scale": 0.5}).past_key_values is None


def test_the_cache_of_another_model_is_refused(kind, fresh):
    family, changes = BLOCK_MODELS[kind]
    other = new_model(family, **changes)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    cache = generate(other, ROWS, **TURN).past_key_values
    refused(fresh, ROWS, cache, "past_key_values.*this model")


def test_the_cache_of_a_model_of_another_size_is_refused(kind, fresh):
    family, changes = BLOCK_MODELS[kind]
    cache = generate(new_model(family, **changes, num_hidden_layers=1), ROWS, **TURN).past_key_values
    refused(fresh, ROWS, cache, "past_key_values.*this model")


@pytest.mark.parametrize("number", [1, 3])
def test_the_cache_of_another_batch_size_is_refused(model, number):
    output = generate(model, [[1, 2, 3], [4]], **TURN)
    refused(model, ROWS * number, output.past_key_values, f"past_key_values.*holds 2 rows, but the batch has {number}")


def test_the_cache_of_another_dtype_is_refused(fresh):
    output = generate(fresh, ROWS, **TURN)
    fresh.to(torch.bfloat16)
    refused(fresh, ROWS, output.past_key_values, "past_key_values.*float32.*bfloat16")


@pytest.mark.parametrize("cache", [DynamicCache(), ((torch.zeros(1),),)], ids=["DynamicCache", "tuple"])
def test_a_cache_of_another_kind_is_refused(model, cache):
    refused(model, ROWS, cache, "`past_key_values` is a")


def test_a_cache_is_refused_where_nothing_is_cached(model):
    output = generate(model, ROWS, **TURN)
    refused(model, ROWS, output.past_key_values, "past_key_values.*cache_policy", cache_policy="none")


def test_a_cache_is_refused_under_guidance(model):
    output = generate(model, ROWS, **TURN)
    refused(model, ROWS, output.past_key_values, "cfg_scale.*past_key_values", cfg_scale=0.5)


def test_a_refused_cache_can_still_be_used(model):
    output = generate(model, [span(1, 14)], **TURN)
    following = [[*output.sequences[0].tolist(), 50]]
    refused(model, following, output.past_key_values, "past_key_values", cfg_scale=0.5)
    resumed = generate(model, following, past_key_values=output.past_key_values, **TURN)
    assert resumed.sequences.tolist() == generate(model, following, **TURN).sequences.tolist()
