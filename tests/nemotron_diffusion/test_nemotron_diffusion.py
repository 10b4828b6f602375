"""Nemotron-Labs-Diffusion: clean text is causal, a block attends both ways, and training does both at once."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from dllm_hf import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from dllm_hf.nemotron_diffusion import NemotronLabsDiffusionEncoder

from ..builders import MASK, generate, nemotron_diffusion_config, new_model, new_tokens, refused

CLEAN = torch.tensor([[5, 17, 33, 2, 8, 40, 9, 11, 12], [7, 8, 9, 10, 11, 12, 13, 14, 15]])
NOISED = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 0, 1, 0, 0]]).bool()
NOISY, LABELS = CLEAN.masked_fill(NOISED, MASK), CLEAN.masked_fill(~NOISED, -100)


@pytest.fixture
def model():
    return new_model("nemotron_diffusion")


def both_losses(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of diffusion and of the next token, block by block and without a cache."""
    diffusion, next_token = [], []
    for row in range(len(CLEAN)):
        for start in range(0, 9, 4):
            end = min(start + 4, 9)
            text = torch.cat([CLEAN[row, :start], NOISY[row, start:end]])[None]
            column = torch.arange(end)
            mask = (column <= column[:, None]) | (column[:, None] >= start)
            logits = model(text, attention_mask=mask[None, None], position_ids=column[None]).logits[0, start:]
            chosen = NOISED[row, start:end]
            diffusion.append(F.cross_entropy(logits[chosen], CLEAN[row, start:end][chosen], reduction="none"))
        logits = model(CLEAN[row : row + 1], use_causal_mask=True).logits[0, :-1]
        next_token.append(F.cross_entropy(logits[NOISED[row, 1:]], CLEAN[row, 1:][NOISED[row, 1:]], reduction="none"))
    return torch.cat(diffusion).mean(), torch.cat(next_token).mean()


def test_the_loss_is_that_of_each_noisy_block_over_a_causal_text_and_that_of_the_next_token(model):
    of_diffusion, of_next_token = both_losses(model)
    output = model(NOISY, labels=LABELS)
    torch.testing.assert_close(output.loss, 0.3 * of_diffusion + of_next_token)
    assert output.logits.shape == (2, 9, 64)
    model.config.dlm_loss_weight, model.config.ar_loss_weight = 2.0, 0.5
    torch.testing.assert_close(model(NOISY, labels=LABELS).loss, 2.0 * of_diffusion + 0.5 * of_next_token)


def test_the_next_token_is_learnt_at_every_labelled_position_whatever_the_masks_weigh(model):
    ratio = torch.where(NOISED, 0.5, torch.inf)  # as the schedule `llada` gives it: labels everywhere
    logits = model(CLEAN, use_causal_mask=True).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), CLEAN[:, 1:].flatten())
    model.config.dlm_loss_weight = 0.0
    torch.testing.assert_close(model(NOISY, labels=CLEAN, mask_ratio=ratio).loss, expected)
    by_trainer = model(NOISY, labels=CLEAN, mask_ratio=ratio, num_items_in_batch=18).loss
    torch.testing.assert_close(by_trainer, expected * 16 / 18)  # nothing predicts the first of each row
    model.config.dlm_loss_weight, model.config.ar_loss_weight = 1.0, 0.0
    of_diffusion = both_losses(model)[0] * NOISED.sum() / 0.5 / 18
    torch.testing.assert_close(model(NOISY, labels=CLEAN, mask_ratio=ratio).loss, of_diffusion)


def test_samples_that_are_packed_into_a_row_have_the_loss_that_they_have_in_rows_of_their_own(model):
    positions = torch.arange(9).repeat(2)[None]
    packed = model(NOISY.view(1, -1), labels=LABELS.view(1, -1), position_ids=positions).loss
    torch.testing.assert_close(packed, model(NOISY, labels=LABELS).loss)


def test_padding_changes_no_loss(model):
    pad = lambda x, value: F.pad(x, (0, 3), value=value)
    mask = pad(torch.ones_like(NOISY), 0)
    padded = model(pad(NOISY, 5), labels=pad(LABELS, -100), attention_mask=mask).loss
    torch.testing.assert_close(padded, model(NOISY, labels=LABELS).loss)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "flex_attention", "canvas"])
@torch.no_grad()
def test_attention_back_ends_agree(model, attention):
    """Whatever makes the mask: a loss, also of packed and of padded texts, a causal pass, the decoding of a batch. (Without
    gradients, which flex attention has none of on a CPU.)"""
    padding = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    losses = [{}, {"position_ids": torch.tensor([[*range(4), *range(5)]] * 2)}, {"attention_mask": padding}]

    def results() -> tuple[list, torch.Tensor, list[list[int]]]:
        causal = model(CLEAN, use_causal_mask=True).logits
        tokens = [new_tokens(model, [5, 17, 33], max_new_tokens=9, cache_policy=name) for name in model.cache_policies]
        tokens += generate(model, [[5, 17, 33], [7]], max_new_tokens=9).sequences.tolist()
        return [model(NOISY, labels=LABELS, **inputs).loss for inputs in losses], causal, tokens

    model.set_attn_implementation("sdpa")
    expected = results()
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):
        found = results()
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-4, rtol=1e-5)
    assert found[2] == expected[2]


def test_a_causal_pass_goes_on_from_a_cache(model):
    whole = model(CLEAN, use_causal_mask=True).logits
    begun = model(CLEAN[:, :5], use_causal_mask=True, use_cache=True)
    rest = model(CLEAN[:, 5:], use_causal_mask=True, past_key_values=begun.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([begun.logits, rest], dim=1), whole, atol=1e-4, rtol=1e-4)


def test_the_stack_alone_loads_its_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    stack, info = NemotronLabsDiffusionEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for name, tensor in stack.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name])
    assert type(AutoModel.from_pretrained(tmp_path)) is NemotronLabsDiffusionModel


@pytest.mark.parametrize(
    "changes, mentions",
    [
        ({"sliding_window": 64}, "sliding_window"),
        ({"dlm_paradigm": "block_diff"}, "dlm_paradigm='block_diff'.*'bidirectional'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"causal_context": False}, "`causal_context=False`.*Leave it out"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "llama_4_scaling_beta"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_configuration_of_another_model_is_refused(changes, mentions):
    with pytest.raises(ValueError, match=mentions):
        nemotron_diffusion_config(**changes)


def test_a_call_cannot_choose_what_the_text_before_a_block_sees(model):
    refused(model, "`causal_context`.*leave it out", causal_context=False)


def test_the_defaults_are_those_of_the_8b_model():
    config = NemotronLabsDiffusionConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 34, 131072)
    assert (config.block_size, config.mask_token_id, config.eos_token_id) == (32, 100, 11)
    assert config.rope_parameters["rope_type"] == "yarn"
    dropped = NemotronLabsDiffusionConfig.from_dict({**config.to_dict(), "attn_implementation": "flex_attention"})
    assert dropped._attn_implementation != "flex_attention"
