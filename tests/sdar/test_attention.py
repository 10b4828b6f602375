"""Without a mask of the caller's, `forward` attends block-causally: the same on every back end, never silently wrong."""

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_bidirectional_mask

from dllm_hf import block_diffusion
from dllm_hf.block_diffusion import block_causal_mask, block_diffusion_mask

from ..builders import MASK, generate, left_pad, new_model

ROW = [3, 4, MASK, 6, 7, MASK, 9, 10, 11, 12, 13]
ROWS = [ROW, [11, MASK, 13], [21, 22, 23, 24, MASK, 26, 27]]
STATIC = {"remasking_strategy": "low_confidence_static"}


@pytest.fixture
def model(family):
    """A model of one's own, to change."""
    return new_model(family)


def sees(model, **kwargs) -> torch.Tensor:
    """`(length, length)` bool: whether the logits of a position change with another token."""
    tokens = torch.tensor([ROW])
    length = len(ROW)
    changed = tokens.repeat(length, 1)
    changed[torch.arange(length), torch.arange(length)] = 40
    kwargs = {
        name: value.expand(length, *value.shape[1:]) if torch.is_tensor(value) else value
        for name, value in kwargs.items()
    }
    with torch.no_grad():
        expected = model(input_ids=tokens.expand(length, -1), **kwargs).logits
        return (model(input_ids=changed, **kwargs).logits - expected).abs().amax(-1).T > 1e-4


def block_causal(length: int, size: int) -> torch.Tensor:
    blocks = torch.arange(length) // size
    return blocks[:, None] >= blocks


def additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "canvas"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_token_sees_its_own_block_and_the_earlier_ones(model, attention):
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(sees(model), block_causal(len(ROW), 4))


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("mask_of, columns", [(block_causal_mask, 9), (block_diffusion_mask, 18)])
def test_the_mask_of_sdpa_is_what_the_library_makes_of_the_rule(mask_of, columns, is_padded, monkeypatch):
    """Also of samples that are packed into a row."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], list(range(9))])
    padding = torch.tensor([[1] * 9, [1] * 6 + [0] * 3]).repeat(1, columns // 9) if is_padded else None
    behind = (None, 2) if mask_of is block_causal_mask else (2, True)
    arguments = (new_model("sdar").config, torch.empty(2, columns, 1), padding, positions, *behind)
    mask = mask_of(*arguments)

    def by_the_library(config, like, padding, sees, cache=None):
        return create_bidirectional_mask(config, like, padding, past_key_values=cache, and_mask_function=sees)

    monkeypatch.setattr(block_diffusion, "mask_of_rule", by_the_library)
    expected = mask_of(*arguments)
    assert mask.shape == expected.shape == (2, 1, columns, columns) and torch.equal(mask, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_the_argument_block_size_overrides_the_configuration(family, model, size):
    assert torch.equal(sees(model, block_size=size), block_causal(len(ROW), size))
    assert torch.equal(sees(new_model(family, block_size=size)), block_causal(len(ROW), size))


def test_the_stack_without_the_head_attends_as_the_model_with_it_does(model):
    tokens = torch.tensor([ROW])
    for kwargs in ({}, {"block_size": 2}):
        with torch.no_grad():
            logits = model.lm_head(model.model(input_ids=tokens, **kwargs).last_hidden_state)
            torch.testing.assert_close(logits, model(input_ids=tokens, **kwargs).logits)


def test_a_4d_mask_is_taken_as_it_is(model):
    length = len(ROW)
    for allowed in (torch.ones(length, length).bool(), torch.ones(length, length).tril().bool()):
        assert torch.equal(sees(model, attention_mask=additive(allowed)[None, None]), allowed)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "flex_attention", "canvas"])
@pytest.mark.parametrize("mask", ["none", "ones", "padding", "4d", "packed"])
@torch.no_grad()
def test_attention_back_ends_agree(model, attention, mask):
    batch = left_pad([ROW] * 2 if mask in ("none", "ones", "packed") else ROWS)
    padding = batch["attention_mask"]
    if mask in ("none", "packed"):
        del batch["attention_mask"]
    if mask == "packed":
        batch["position_ids"] = torch.tensor([[*range(5), *range(6)], [*range(2), *range(1), *range(8)]])
    if mask == "4d":
        allowed = block_causal(len(ROW), 3) & padding[:, None, None, :].bool()
        batch["attention_mask"] = additive(allowed | torch.eye(len(ROW)).bool())
        batch["position_ids"] = (padding.cumsum(-1) - 1).clamp(min=0)
    model.set_attn_implementation("sdpa")
    expected = model(**batch).logits
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):
        logits = model(**batch).logits
    torch.testing.assert_close(logits[padding == 1], expected[padding == 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "canvas"])
@torch.no_grad()
def test_left_padding_changes_no_real_position(model, attention):
    model.set_attn_implementation(attention)
    logits = model(**left_pad(ROWS)).logits
    for index, row in enumerate(ROWS):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[index, len(ROW) - len(row) :], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_samples_packed_into_a_row_do_not_see_each_other(model):
    one, two, three = ROW[:5], ROW[5:6], ROW[6:]
    positions = torch.tensor([[*range(5), *range(1), *range(5)]])
    logits = model(input_ids=torch.tensor([ROW]), position_ids=positions).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in (one, two, three)])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "canvas"])
@torch.no_grad()
def test_a_cache_of_the_library_s_fed_block_by_block_gives_the_whole_forward(model, attention):
    model.set_attn_implementation(attention)
    tokens, cache, logits = torch.tensor([ROW, ROW[::-1]]), DynamicCache(), []
    for start, end in ((0, 8), (8, 11)):
        logits.append(model(input_ids=tokens[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(input_ids=tokens).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_so_it_does_with_padding(model):
    batch, cache, logits = left_pad([ROW + [1], ROW[:8]]), DynamicCache(), []
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for start, end in ((0, 8), (8, 12)):  # four real tokens and then four more in the second row
        logits.append(
            model(
                input_ids=batch["input_ids"][:, start:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
        )
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(torch.cat(logits, 1)[real], model(**batch).logits[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_are_counted_without_the_padding_also_beside_a_cache(model):
    batch, cache = left_pad(ROWS), DynamicCache()
    real = batch["attention_mask"] == 1
    logits = model(**batch, past_key_values=cache).logits
    torch.testing.assert_close(logits[real], model(**batch).logits[real], atol=1e-5, rtol=1e-4)
    # And where the cache holds what the mask tells of: the new tokens begin blocks of the rows.
    batch, cache = left_pad([ROW[:8], ROW[:4]]), DynamicCache()
    model(**batch, past_key_values=cache)
    more = torch.tensor([[50, 51, 52], [53, 54, 55]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    logits = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    whole = model(input_ids=torch.cat([batch["input_ids"], more], dim=1), attention_mask=mask).logits
    torch.testing.assert_close(logits, whole[:, 8:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_embeddings_stand_in_for_tokens(model):
    tokens = torch.tensor([ROW])
    embeddings = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=tokens).logits, atol=0, rtol=0)


@torch.no_grad()
def test_only_the_positions_to_keep_reach_the_head(model):
    tokens = torch.tensor([ROW, ROW[::-1]])
    logits = model(input_ids=tokens).logits
    per_row = torch.tensor([[1, 4], [6, 0]])
    kept = model(input_ids=tokens, logits_to_keep=per_row).logits
    torch.testing.assert_close(kept, logits.take_along_dim(per_row[..., None], dim=1), atol=1e-5, rtol=1e-4)
    kept = model(input_ids=tokens, logits_to_keep=2).logits
    torch.testing.assert_close(kept, logits[:, -2:], atol=1e-5, rtol=1e-4)


def test_it_runs_in_bfloat16(model):
    model.to(torch.bfloat16)
    tokens = torch.tensor([ROW])
    output = model(input_ids=tokens, labels=torch.where(tokens == MASK, 8, -100))
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()
    assert output.loss.dtype == torch.float32
    assert not (model.diffusion_generate(tokens[:, :2], max_new_tokens=8) == MASK).any()


# --- FlashAttention, which ignores masks. It is not run here: the layers are watched.


@pytest.fixture
def asked(model, monkeypatch):
    """`(attention back end, columns fed)` of each pass through the first layer, which itself runs on SDPA."""
    asked, layer = [], model.model.layers[0].self_attn
    forward = type(layer).forward

    def look(self, hidden_states, *args, **kwargs):
        attention = self.config._attn_implementation
        if self is layer:
            asked.append((attention, hidden_states.shape[1]))
        self.config._attn_implementation = "sdpa"
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            self.config._attn_implementation = attention

    monkeypatch.setattr(type(layer), "forward", look)
    model.config._attn_implementation = "flash_attention_2"
    return asked


def test_flash_attention_gives_way_to_sdpa_where_several_blocks_are_fed(model, asked):
    tokens = torch.tensor([ROW])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        model(input_ids=tokens, attention_mask=additive(block_causal(len(ROW), 2))[None, None])
    assert asked == [("sdpa", len(ROW))] * 2
    assert model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, logits, atol=0, rtol=0)


def test_flash_attention_is_refused_where_gradients_are_needed(model, asked):
    tokens = torch.tensor([ROW])
    for kwargs in ({}, {"labels": torch.where(tokens == MASK, 8, -100)}):
        with pytest.raises(ValueError, match="FlashAttention.*attn_implementation"):
            model(input_ids=tokens, **kwargs)
    assert not asked
    assert model.config._attn_implementation == "flash_attention_2"


def test_the_loss_without_gradients_runs_on_sdpa(model, asked):
    """As when a `Trainer` evaluates."""
    tokens = torch.tensor([ROW])
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=torch.where(tokens == MASK, 8, -100)).loss
    assert asked == [("sdpa", 2 * len(ROW))]
    assert loss.isfinite()


def test_flash_attention_decodes_the_blocks_of_rows_of_one_length(model, asked):
    generate(model, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], max_new_tokens=7, denoising_steps=3, **STATIC)
    flash, sdpa = "flash_attention_2", "sdpa"
    assert asked == [(sdpa, 8), (flash, 4), (flash, 4), (sdpa, 8), (flash, 4), (flash, 4)]
    assert model.config._attn_implementation == flash


def test_flash_attention_gives_way_where_blocks_of_rows_of_different_lengths_are_fed(model, asked):
    generate(model, [[1, 2, 3, 4, 5], [6]], max_new_tokens=7, denoising_steps=3, **STATIC)
    assert {attention for attention, _ in asked} == {"sdpa"}
    assert model.config._attn_implementation == "flash_attention_2"


def test_flash_attention_gives_way_where_nothing_is_cached(model, asked):
    generate(model, [[1, 2, 3, 4, 5]], max_new_tokens=7, cache_policy="none", **STATIC)
    assert {attention for attention, _ in asked} == {"sdpa"}


def test_the_back_end_comes_back_after_an_error(model, asked):
    def fail(step, sequences, logits):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(model, [[1, 2], [3]], max_new_tokens=7, generation_logits_hook_func=fail, **STATIC)
    assert model.config._attn_implementation == "flash_attention_2"
