"""What the decoding loop asks of a model, as the table in docs/architecture.md says, and what every model keeps to."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Cache

from ..builders import BUILDERS, MASK, generate, left_pad, new_model, new_tokens, recorded, tiny_model
from .calls import BLOCK_FAMILIES, PAIRS, POLICIES, STATIC

ARCHITECTURE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
COLUMNS = {"llada": 0, "llada_moe": 0, "dream": 1, "sdar": 2, "sdar_moe": 2, "llada2": 3, "gla_dream": 4}
COLUMNS |= {"nemotron_diffusion": 5, "fast_dllm_v2": 6}
TOKENS = torch.tensor([[5, MASK, 17, 33, 2, 8, MASK, 9]])


@pytest.fixture(params=BUILDERS)
def family(request) -> str:
    return request.param


def said_of(attribute: str, family: str) -> str:
    [row] = re.findall(rf"^\| `{attribute}`.*\|$", ARCHITECTURE, re.MULTILINE)
    return row.strip("|").split("|")[1 + COLUMNS[family]].strip()


def test_the_attributes_are_those_of_the_documentation(family):
    model = tiny_model(family)
    switches = ("sees_earlier_blocks", "causal_context", "seeds_blocks", "supports_editing", "makes_masks")
    for name in (*switches, "has_fixed_block_length"):
        assert {"yes": True, "no": False}[said_of(name, family)] is getattr(model, name), name
    assert said_of("cache_policies", family).split(", ") == list(model.cache_policies) == list(POLICIES[family])
    assert said_of("cache_dtypes", family) == (", ".join(model.cache_dtypes) or "none")
    for name in ("block_grid", "default_remasking_strategy", "confidence_source", "quota_source"):
        assert said_of(name, family).strip("`") == getattr(model, name), name
    shift = said_of("logits_shift", family)
    assert model.logits_shift == (model.config.logits_shift if "config" in shift else int(shift))
    length = {"32": 32, "all masks": None, "`config.block_size`": getattr(model.config, "block_size", None)}
    assert model.default_block_length == length[said_of("default_block_length", family)]
    assert said_of("default_small_block_size", family) == str(model.default_small_block_size or "none")
    assert type(model.make_cache(8)).__name__ == said_of(r"make_cache\(width\)", family).strip("`")


def test_a_cache_of_its_own_is_one_of_the_library_s(family):
    assert isinstance(tiny_model(family).make_cache(8), Cache)


@torch.no_grad()
def test_the_kept_logits_are_those_of_all_positions(family):
    """`logits_to_keep` are indices, `(batch, kept)`; the head's output is not shifted."""
    model, keep = tiny_model(family), torch.tensor([[6, 0, 3, 3], [1, 2, 7, 5]])
    tokens = TOKENS.repeat(2, 1)
    tokens[1] = tokens[1].flip(0)
    positions = torch.arange(8).expand(2, -1)
    every = model(input_ids=tokens, position_ids=positions).logits
    kept = model(input_ids=tokens, position_ids=positions, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, every.gather(1, keep[..., None].expand(-1, -1, every.shape[-1])))


@torch.no_grad()
def test_a_mask_sees_what_stands_after_it_in_its_block(family):
    """No family is causal: the token behind a position changes what is said of it."""
    model, changed = new_model(family), TOKENS.clone()
    changed[0, 3] = 40
    positions = torch.arange(8)[None]
    before, after = (model(input_ids=ids, position_ids=positions).logits[0, 1] for ids in (TOKENS, changed))
    assert not torch.allclose(before, after, atol=1e-3)


def test_attention_layers_say_that_they_are_not_causal(family):
    for layer in new_model(family).model.layers:
        assert getattr(layer.self_attn, "is_causal", False) is False


def test_the_mask_is_never_proposed_however_sure_the_model_is_of_it(pair):
    family, policy = pair
    model = new_model(family)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 10 * model.lm_head.weight.abs().sum(0)
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 8, "cache_policy": policy, "temperature": temperature}
        assert MASK not in generate(model, [[5, 17], [MASK, 3, 4]], **options).sequences


def test_a_canvas_begins_at_position_0_whatever_the_padding(pair):
    family, policy = pair
    model = tiny_model(family)
    with recorded(model) as calls:
        generate(model, [[5, 17, 33, 2, 8, 40], [12]], max_new_tokens=4, cache_policy=policy, **STATIC)
    assert calls[0]["position_ids"].amin(1).tolist() == [0] * len(calls[0]["position_ids"])
    assert max(int(call["position_ids"].max()) for call in calls) < 6 + 4 + 4


@pytest.mark.parametrize("family, policy", [pair for pair in PAIRS if pair[1] != "none"])
def test_a_cache_keeps_its_place_in_memory_while_it_is_decoded(family, policy):
    """Nothing is appended to it."""
    model, places = tiny_model(family), set()

    def note(module, args, kwargs):
        cache = kwargs["past_key_values"]
        layer = cache.layers[0]
        if layer.is_initialized:
            places.add((layer.state if family == "gla_dream" else layer.keys).data_ptr())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(model, [[5, 17, 33, 2, 8, 40]], max_new_tokens=16, block_length=4, cache_policy=policy, **STATIC)
    finally:
        handle.remove()
    assert len(places) == 1


def test_generate_is_diffusion_generate(pair):
    family, policy = pair
    model, options = tiny_model(family), {"max_new_tokens": 6, "cache_policy": policy, **STATIC}
    inputs = left_pad([[5, 17, 33], [12]])
    assert model.generate(**inputs, **options).tolist() == model.diffusion_generate(**inputs, **options).tolist()


def test_what_is_saved_decodes_the_same_when_it_is_loaded(family, tmp_path):
    model = new_model(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 8, **STATIC}
    assert type(loaded) is type(model)
    assert new_tokens(loaded, [5, 17, 33], **options) == new_tokens(model, [5, 17, 33], **options)


def test_a_cache_that_later_calls_can_use_comes_with_the_policy_block_alone(pair):
    family, policy = pair
    output = generate(tiny_model(family), [[5, 17, 33]], max_new_tokens=4, cache_policy=policy)
    assert (output.past_key_values is not None) == (policy == "block")


def test_the_policies_of_other_families_are_refused_by_name(family):
    model = tiny_model(family)
    others = {"none", "block", "prefix", "dual", "frob"} - {*POLICIES[family]}
    assert others
    for policy in others:
        with recorded(model) as calls, pytest.raises(ValueError, match="cache_policy.*choose one of"):
            generate(model, [[1, 2]], max_new_tokens=4, cache_policy=policy)
        assert not calls


def test_block_families_see_earlier_blocks_alone(family):
    """A later block changes nothing in an earlier one, or the policy `block` would not be exact. Where clean text is causal
    but the block is not, the loop makes that mask, and `forward` by itself sees everything."""
    model, positions, changed = tiny_model(family), torch.arange(8)[None], TOKENS.clone()
    changed[0, 7] = 40
    with torch.no_grad():
        before, after = (model(input_ids=ids, position_ids=positions).logits[0, :4] for ids in (TOKENS, changed))
    sees_earlier_blocks = family in BLOCK_FAMILIES and not model.causal_context
    assert torch.allclose(before, after, atol=1e-5) == sees_earlier_blocks
