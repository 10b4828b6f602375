"""The cache without the decoding loop: one state per layer, that goes on where the last call stopped."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dllm_hf.gla_dream import GLADreamCache

from ..builders import MASK, generate, left_pad, new_model
from .conftest import INJECTIONS

TEXT = [(7 * index + 3) % 59 for index in range(40)]
STATIC = {"remasking_strategy": "low_confidence_static", "eos_token_id": []}


@pytest.fixture
def model(injection, shift):
    return new_model("gla_dream", inter_block_injection_mode=injection, logits_shift=shift)


@torch.no_grad()
def fed(model, *pieces: list[int], cache=None):
    """The logits of each piece of a text, and the cache that is left."""
    cache = GLADreamCache(model) if cache is None else cache
    logits = [model(input_ids=torch.tensor([piece]), past_key_values=cache).logits[0] for piece in pieces]
    return logits, cache


def cut(text: list[int], sizes: list[int]) -> list[list[int]]:
    return [piece.tolist() for piece in torch.tensor(text).split(sizes)]


def held(cache) -> dict[str, torch.Tensor]:
    """All that a cache holds."""
    states = {f"state of layer {index}": layer.state for index, layer in enumerate(cache.layers)}
    every = {**states, "last_hidden": cache.last_hidden, "pending": cache.pending}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def assert_holds_the_same(one, other):
    one, other = held(one), held(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_ten_cached_calls_of_a_block_each_give_the_logits_of_one_call(model):
    pieces, cache = fed(model, *cut(TEXT, [4] * 10))
    [whole], _ = fed(model, TEXT)
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(input_ids=torch.tensor([TEXT])).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("injection", INJECTIONS)
@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=4), shift=st.sampled_from([0, 1]))
def test_a_prompt_in_pieces_of_any_sizes_leaves_what_the_whole_leaves(injection, sizes, shift):
    model = new_model("gla_dream", inter_block_injection_mode=injection, logits_shift=shift)
    text = TEXT[: sum(sizes)]
    _, pieces = fed(model, *cut(text, sizes))
    _, whole = fed(model, text)
    assert_holds_the_same(pieces, whole)
    assert pieces.get_seq_length() == whole.get_seq_length() == len(text)
    [after_pieces], [after_whole] = (fed(model, [50, 51, 52], cache=cache)[0] for cache in (pieces, whole))
    torch.testing.assert_close(after_pieces, after_whole, atol=1e-4, rtol=1e-4)


def test_a_block_that_a_call_leaves_unfinished_is_computed_again_by_the_next(model):
    """Its tokens see each other: what completes it changes what they say."""
    [_, logits], _ = fed(model, TEXT[:6], TEXT[6:10])
    [whole], _ = fed(model, TEXT[:10])
    torch.testing.assert_close(logits, whole[6:], atol=1e-4, rtol=1e-4)


def test_the_cache_does_not_grow(model):
    sizes = []
    for length in (8, 40):
        _, cache = fed(model, TEXT[:length])
        sizes.append(sum(tensor.numel() for tensor in held(cache).values()))
    assert sizes[0] == sizes[1]


def test_its_states_are_float32_whatever_the_model_is():
    _, cache = fed(new_model("gla_dream").to(torch.bfloat16), TEXT)
    for layer in cache.layers:
        assert layer.state.dtype == torch.float32
        assert layer.state.shape == (1, 4, 8, 8)


def test_a_call_that_is_asked_for_a_cache_makes_one():
    model = new_model("gla_dream")
    with torch.no_grad():
        assert model(input_ids=torch.tensor([TEXT])).past_key_values is None
        cache = model(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    assert_holds_the_same(cache, fed(model, TEXT)[1])


def test_a_cache_that_is_reset_starts_anew(model):
    _, cache = fed(model, TEXT)
    cache.reset()
    assert_holds_the_same(fed(model, TEXT[:6], cache=cache)[1], fed(model, TEXT[:6])[1])


def test_a_copy_of_a_cache_goes_its_own_way(model):
    _, cache = fed(model, TEXT[:10])
    other = copy.deepcopy(cache)
    fed(model, TEXT[20:30], cache=other)
    assert_holds_the_same(cache, fed(model, TEXT[:10])[1])


# --- its rows

OTHER_ROWS = {
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("change", OTHER_ROWS)
@pytest.mark.parametrize("length", [2, 7], ids=["less than a block", "more than a block"])
@torch.no_grad()
def test_rows_are_selected_reordered_and_repeated(change, length):
    model = new_model("gla_dream", logits_shift=1)
    rows, following = torch.tensor(TEXT[:21]).view(3, 7)[:, :length], torch.tensor([[50, 51, 52]])
    cache = model(input_ids=rows, use_cache=True).past_key_values
    before = held(cache)
    apply, left = OTHER_ROWS[change]
    apply(cache)
    assert all(torch.equal(tensor, before[name][left]) for name, tensor in held(cache).items())
    following = following.expand(len(left), -1)
    logits = model(input_ids=following, past_key_values=cache).logits
    whole = model(input_ids=torch.cat([rows[left], following], dim=1)).logits
    torch.testing.assert_close(logits, whole[:, length:], atol=1e-4, rtol=1e-4)


# --- what a direct call refuses, and what it may do with the cache of a generation


@torch.no_grad()
def test_padding_beside_a_cache_is_refused():
    model = new_model("gla_dream")
    for kwargs in ({"use_cache": True}, {"past_key_values": GLADreamCache(model)}):
        with pytest.raises(ValueError, match="padding.*`diffusion_generate`.*use_cache=False"):
            model(**left_pad([TEXT[:6], TEXT[:3]]), **kwargs)


@torch.no_grad()
def test_positions_that_do_not_go_on_from_the_cache_are_refused():
    model = new_model("gla_dream")
    _, cache = fed(model, TEXT[:6])
    tokens = torch.tensor([TEXT[6:9]])
    model(input_ids=tokens, position_ids=torch.tensor([[6, 7, 8]]), past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="`position_ids` must go on from 6.*leave them out"):
        model(input_ids=tokens, position_ids=torch.tensor([[0, 1, 2]]), past_key_values=cache)


def test_a_cache_of_keys_and_values_is_refused():
    model, tokens = new_model("gla_dream"), torch.tensor([TEXT[:6]])
    with pytest.raises(ValueError, match="`past_key_values` is a DynamicCache.*`GLADreamCache`"):
        model(input_ids=tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="`past_key_values` is a DynamicCache.*an earlier call returned"):
        model.diffusion_generate(tokens, max_new_tokens=4, past_key_values=DynamicCache())


@pytest.mark.parametrize("made_by", ["call", "generation"])
@torch.no_grad()
def test_a_batch_of_another_size_than_the_cache_s_is_refused(made_by):
    model = new_model("gla_dream")
    cache = fed(model, TEXT[:8])[1]
    if made_by == "generation":
        cache = generate(model, [TEXT[:8]], max_new_tokens=4, **STATIC).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds 1 rows, but the batch has 2"):
        model(input_ids=torch.tensor([TEXT[8:12]] * 2), past_key_values=cache)


def test_a_state_cannot_be_cropped():
    _, cache = fed(new_model("gla_dream"), TEXT)
    with pytest.raises(ValueError, match="cannot be cropped.*new cache"):
        cache.crop(4)


def test_a_generation_leaves_the_state_before_its_last_block(model):
    output = generate(model, [TEXT[:6]], max_new_tokens=10, **STATIC)
    _, expected = fed(model, output.sequences[0, :12].tolist())
    assert output.past_key_values.get_seq_length() == 12
    expected.pending = None  # no token of a block waits
    assert_holds_the_same(output.past_key_values, expected)


def test_a_call_goes_on_from_the_cache_of_a_generation(model):
    output = generate(model, [TEXT[:6]], max_new_tokens=10, **STATIC)
    text = output.sequences[0].tolist()
    [logits], _ = fed(model, text[12:], cache=output.past_key_values)
    [whole], _ = fed(model, text)
    torch.testing.assert_close(logits, whole[12:], atol=1e-4, rtol=1e-4)


def test_a_call_cannot_go_on_where_rows_stand_at_different_columns():
    model = new_model("gla_dream")
    cache = generate(model, [TEXT[:9], TEXT[:3]], max_new_tokens=6, **STATIC).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` comes from a call whose rows ended at different columns"):
        model(input_ids=torch.tensor([[1, 2]] * 2), past_key_values=cache)


@pytest.mark.parametrize("fails", ["before the pass", "in the pass", "after the pass"])
def test_a_call_cannot_go_on_from_a_generation_that_did_not_end(fails):
    model = new_model("gla_dream")
    cache = generate(model, [TEXT[:6]], max_new_tokens=6, **STATIC).past_key_values
    module = {"before the pass": model, "in the pass": model.model.layers[1], "after the pass": model.lm_head}[fails]

    def fail(module, args):
        raise RuntimeError("stop")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, [TEXT[:12]], max_new_tokens=6, past_key_values=cache, **STATIC)
    handle.remove()
    with pytest.raises(ValueError, match="`past_key_values` comes from a call .*that did not end"):
        model(input_ids=torch.tensor([[1, MASK]]), past_key_values=cache)
