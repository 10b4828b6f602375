"""What every family promises of its forward pass, and what those promise that run on attention without a direction."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from .builders import BUILDERS, END, FAMILIES, MASK, VOCAB, left_pad, new_model, recorded

every_family = pytest.mark.parametrize("family", BUILDERS)
also_gla_dream = pytest.mark.parametrize("family", [*FAMILIES, "gla_dream"])
ROWS = [[3, 4, MASK, 6, 7, MASK, 9], [11, MASK, 13], [21, 22, 23, 24, MASK]]


@pytest.fixture
def model(family):
    """A model of one's own, to change."""
    return new_model(family)


def rows_of(tensor, rows=ROWS):
    """`(batch, width, ...)`, left-padded -> what stands at the real positions of each row."""
    return [row[row.shape[0] - len(tokens) :] for row, tokens in zip(tensor, rows)]


def as_4d(mask: torch.Tensor) -> torch.Tensor:
    """`(batch, keys)` of 0 and 1 -> `(batch, 1, queries, keys)`, what is added to the scores."""
    blocked = (mask == 0)[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo(torch.float32).min)


@torch.no_grad()
def test_attention_has_no_direction(model):
    tokens = torch.tensor([ROWS[0]])
    changed = tokens.clone()
    changed[0, -1] = 40
    difference = (model(input_ids=tokens).logits - model(input_ids=changed).logits).abs().amax(-1)
    assert (difference > 1e-3).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "flex_attention", "canvas"])
@pytest.mark.parametrize("mask", ["none", "ones", "padding", "4d"])
@torch.no_grad()
def test_attention_back_ends_agree(model, attention, mask):
    batch = left_pad([ROWS[0]] * 2 if mask in ("none", "ones") else ROWS)
    padding = batch["attention_mask"]
    if mask == "none":
        del batch["attention_mask"]
    if mask == "4d":
        batch["attention_mask"] = as_4d(padding)
        batch["position_ids"] = (padding.cumsum(-1) - 1).clamp(min=0)
    model.set_attn_implementation("sdpa")
    expected = model(**batch).logits
    model.set_attn_implementation(attention)
    # Compiled for a CPU (torch 2.13), flex attention takes the process down where it gets a 4-D mask.
    with torch.compiler.set_stance("force_eager"):
        logits = model(**batch).logits
    torch.testing.assert_close(logits[padding == 1], expected[padding == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "canvas"])
@torch.no_grad()
def test_left_padding_changes_no_real_position(model, attention):
    model.set_attn_implementation(attention)
    for row, logits in zip(ROWS, rows_of(model(**left_pad(ROWS)).logits)):
        torch.testing.assert_close(logits, model(input_ids=torch.tensor([row])).logits[0], atol=1e-5, rtol=0)


@also_gla_dream
@torch.no_grad()
def test_what_the_padding_holds_changes_no_real_position(model):
    one, other = left_pad(ROWS, pad=END), left_pad(ROWS, pad=5)
    for a, b in zip(rows_of(model(**one).logits), rows_of(model(**other).logits)):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@also_gla_dream
@torch.no_grad()
def test_position_ids_count_real_tokens(model):
    batch = left_pad(ROWS)
    counted = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 2, 3, 4]])
    with recorded(model.model) as calls:
        model(**batch)
    given = calls[0]["position_ids"]
    assert given is None or given.tolist() == counted.tolist()  # GLADream's stack counts for itself
    torch.testing.assert_close(model(**batch).logits, model(**batch, position_ids=counted).logits, atol=0, rtol=0)


@also_gla_dream
@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(model):
    tokens = torch.tensor([ROWS[0]])
    with_mask = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(with_mask, model(input_ids=tokens).logits, atol=1e-5, rtol=0)


@also_gla_dream
@torch.no_grad()
def test_only_the_positions_to_keep_reach_the_head(model):
    tokens = torch.tensor([ROWS[0], ROWS[0][::-1]])
    logits = model(input_ids=tokens).logits
    per_row = torch.tensor([[1, 4], [6, 0]])
    for keep, expected in (
        (2, logits[:, -2:]),
        (torch.tensor([0, 5]), logits[:, [0, 5]]),
        (per_row, logits.take_along_dim(per_row[..., None], dim=1)),
    ):
        with recorded(model.lm_head) as calls:
            kept = model(input_ids=tokens, logits_to_keep=keep).logits
        assert calls[0].shape[1] == 2
        torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0)


@also_gla_dream
@torch.no_grad()
def test_embeddings_stand_in_for_tokens(model):
    tokens = torch.tensor([ROWS[0]])
    embeddings = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=tokens).logits, atol=0, rtol=0)


@also_gla_dream
@torch.no_grad()
def test_a_tuple_and_the_inner_states_are_given_on_request(model):
    tokens = torch.tensor([ROWS[0]])
    output = model(input_ids=tokens, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model(input_ids=tokens, return_dict=False)[0], output.logits, atol=0, rtol=0)


@every_family
@pytest.mark.parametrize("labels", [None, torch.tensor([[-100, -100, 8, -100, -100, 8, -100]])])
@torch.no_grad()
def test_a_configuration_may_ask_for_tuples(family, labels):
    tokens, tuples = torch.tensor([ROWS[0]]), new_model(family, return_dict=False)
    expected = new_model(family)(input_ids=tokens, labels=labels)
    torch.testing.assert_close(tuples(input_ids=tokens, labels=labels)[0], expected[0], atol=0, rtol=0)
    assert isinstance(tuples.model(input_ids=tokens), tuple)


@every_family
def test_the_embedding_of_the_padding_token_starts_like_any_other(model):
    assert model.get_input_embeddings().weight[END].abs().sum() > 0


@also_gla_dream
def test_the_embedding_of_the_padding_token_learns(model):
    tokens = torch.tensor([[3, END, MASK]])
    model(input_ids=tokens, labels=torch.tensor([[-100, -100, 8]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[END].abs().sum() > 0


@also_gla_dream
def test_a_resized_vocabulary_is_saved_and_loaded(model, tmp_path):
    model.resize_token_embeddings(VOCAB + 8)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.config.vocab_size == loaded.get_output_embeddings().weight.shape[0] == VOCAB + 8
    tokens = torch.tensor([[3, VOCAB + 7, MASK]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=0, rtol=0)


@also_gla_dream
def test_it_runs_in_bfloat16(model):
    model.to(torch.bfloat16)
    tokens = torch.tensor([ROWS[0]])
    output = model(input_ids=tokens, labels=torch.where(tokens == MASK, 8, -100))
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()
    assert output.loss.dtype == torch.float32
    assert not (model.diffusion_generate(tokens[:, :2], max_new_tokens=8) == MASK).any()


@pytest.fixture
def asked(model, monkeypatch):
    """`(attention back end, columns fed)` of each forward pass of a generation. FlashAttention itself is not run."""
    asked, forward = [], model.forward

    def look(**kwargs):
        attention = model.config._attn_implementation
        asked.append((attention, kwargs["input_ids"].shape[1]))
        model.config._attn_implementation = "sdpa"
        try:
            return forward(**kwargs)
        finally:
            model.config._attn_implementation = attention

    monkeypatch.setattr(model, "forward", look)
    model.config._attn_implementation = "flash_attention_2"
    return asked


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_flash_attention_gives_way_to_sdpa_where_windows_of_rows_of_different_lengths_are_fed(model, asked, policy):
    prompts = [[3, 4, 5, 6, 7], [11, 12, 13], [21, 22, 23, 24]]
    in_step = {"denoising_steps": 2, "remasking_strategy": "low_confidence_static"}  # all rows in each pass
    model.diffusion_generate(**left_pad(prompts), max_new_tokens=4, cache_policy=policy, **in_step)
    canvas = 5 + 4
    assert {attention for attention, columns in asked if columns < canvas} == {"sdpa"}
    assert {attention for attention, columns in asked if columns == canvas} == {"flash_attention_2"}
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("policy", ["none", "prefix", "dual"])
def test_flash_attention_stays_where_rows_are_of_one_length(model, asked, policy):
    model.diffusion_generate(torch.tensor([ROWS[0]] * 2), max_new_tokens=4, cache_policy=policy)
    assert {attention for attention, _ in asked} == {"flash_attention_2"}


def test_flash_attention_stays_where_nothing_is_cached(model, asked):
    model.diffusion_generate(**left_pad(ROWS), max_new_tokens=4, cache_policy="none")
    assert {attention for attention, _ in asked} == {"flash_attention_2"}


def test_the_attention_back_end_comes_back_after_an_error(model, asked):
    calls = []

    def fails_in_a_window(step, sequences, logits):
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return logits

    with pytest.raises(RuntimeError, match="stop"):
        model.diffusion_generate(
            **left_pad(ROWS), max_new_tokens=4, cache_policy="dual", generation_logits_hook_func=fails_in_a_window
        )
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_a_sample_with_padding_may_begin_at_any_position(model):
    """Padding stands at position 0, which is behind it and no sample of its own."""
    tokens = torch.tensor([[3, MASK, 5, 0, 0]])
    batch = {"input_ids": tokens, "labels": torch.where(tokens == MASK, 8, -100)}
    batch["position_ids"] = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    alone = model(**{name: values[:, :3] for name, values in batch.items()}).loss
    torch.testing.assert_close(model(**batch, attention_mask=mask).loss, alone)
