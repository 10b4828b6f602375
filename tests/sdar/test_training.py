"""The training forward: noisy blocks that see clean ones, in one pass."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from ..builders import MASK, VOCAB, left_pad, new_model, recorded
from ..noised_pairs import CLEAN, MASKED, PAIRS, assert_same_gradients, assert_same_loss, batch_of, gradients, noised
from .conftest import SDAR_FAMILIES


@pytest.fixture
def model(family):
    return new_model(family)


def cross_entropies(model, clean, masked, size) -> torch.Tensor:
    """From the definition: each noisy block after the clean ones before it, by itself, and nothing else."""
    losses = []
    for start in range(0, len(clean), size):
        noisy, labels = (row[start : start + size] for row in noised(clean, masked))
        tokens = torch.tensor([clean[:start] + noisy])
        length = tokens.shape[1]
        blocks = torch.arange(length) // size
        allowed = torch.zeros(1, 1, length, length).masked_fill(
            blocks[:, None] < blocks, torch.finfo(torch.float32).min
        )
        logits = model(input_ids=tokens, attention_mask=allowed).logits[0, start:]
        losses.append(F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100, reduction="none"))
    return torch.cat(losses)[masked]


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_the_loss_of_a_pair_equals_its_definition_and_so_do_its_gradients(model, size):
    noisy, labels = PAIRS[0]
    loss = model(input_ids=torch.tensor([noisy]), labels=torch.tensor([labels]), block_size=size).loss
    expected = cross_entropies(model, CLEAN[0], MASKED[0], size).mean()
    assert_same_loss(model, loss, expected)


def test_the_block_size_is_the_configuration_s_where_none_is_given(family):
    model = new_model(family, block_size=3)
    noisy, labels = (torch.tensor([row]) for row in PAIRS[0])
    expected = cross_entropies(model, CLEAN[0], MASKED[0], 3).mean()
    torch.testing.assert_close(model(input_ids=noisy, labels=labels).loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(model, side):
    expected = torch.cat([cross_entropies(model, c, m, 4) for c, m in zip(CLEAN, MASKED, strict=True)]).mean()
    assert_same_loss(model, model(**batch_of(side=side)).loss, expected)


def test_the_loss_of_packed_samples_is_that_of_the_samples(model):
    tokens, labels = (torch.tensor([sum((pair[part] for pair in PAIRS), [])]) for part in (0, 1))
    positions = torch.tensor([[position for clean in CLEAN for position in range(len(clean))]])
    expected = torch.cat([cross_entropies(model, c, m, 4) for c, m in zip(CLEAN, MASKED, strict=True)]).mean()
    loss = model(input_ids=tokens, labels=labels, position_ids=positions).loss
    assert_same_loss(model, loss, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_attention_back_ends_give_the_same_loss(model, attention, packed):
    """Without gradients, which flex attention has none of on a CPU."""
    batch = batch_of()
    if packed:
        batch["attention_mask"][:] = 1
        batch["position_ids"] = torch.tensor([[*range(4), *range(7)], [*range(11)], [*range(1), *range(10)]])
    expected = model(**batch)
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):
        output = model(**batch)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_gives_the_router_s_loss_too():
    model = new_model("sdar_moe")
    expected = model(**batch_of(), output_router_logits=True)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        output = model(**batch_of(), output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_text_of_one_block_goes_without_its_clean_half_and_loses_the_same(model, length):
    tokens = torch.tensor([[3, MASK, 5, MASK][:length], [MASK, 6, 7, 8][:length]])
    labels = torch.where(tokens == MASK, 9, -100)
    ratio = torch.tensor([0.5, 0.25])
    with recorded(model.model.embed_tokens) as seen:
        short = model(tokens, labels=labels, mask_ratio=ratio)
        long = model(tokens, labels=labels, mask_ratio=ratio, position_ids=torch.arange(length)[None])
    assert [tuple(ids.shape) for ids in seen] == [(2, length), (2, 2 * length)]
    torch.testing.assert_close(short.loss, long.loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(short.logits, long.logits, atol=1e-5, rtol=1e-4)
    assert_same_gradients(gradients(model, short.loss), gradients(model, long.loss))


def test_padded_texts_of_one_block_lose_the_same_as_with_their_clean_half(model):
    batch = {"input_ids": [[0, 0, MASK, 5], [3, MASK, 6, 7]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    batch = {name: torch.tensor(rows) for name, rows in batch.items()}
    batch["labels"] = torch.where(batch["input_ids"] == MASK, 9, -100)
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    short, long = model(**batch), model(**batch, position_ids=positions)
    torch.testing.assert_close(short.loss, long.loss, atol=1e-6, rtol=1e-5)
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(short.logits[real], long.logits[real], atol=1e-5, rtol=1e-4)


def test_a_block_size_that_is_given_says_what_one_block_is(model):
    noisy, labels = (torch.tensor([row]) for row in PAIRS[0])
    for size, columns in ((11, 11), (10, 22)):
        with recorded(model.model.embed_tokens) as seen:
            model(noisy, labels=labels, block_size=size)
        assert seen[0].shape == (1, columns)


def test_a_masking_probability_weighs_the_tokens(model):
    ratio = torch.tensor([0.5, 0.25, 0.8])
    losses = [cross_entropies(model, c, m, 4) for c, m in zip(CLEAN, MASKED, strict=True)]
    expected = sum(row.sum() / r for row, r in zip(losses, ratio, strict=True)) / sum(map(len, CLEAN))
    batch = batch_of()
    torch.testing.assert_close(model(**batch, mask_ratio=ratio).loss, expected, atol=1e-5, rtol=1e-5)
    per_token = ratio[:, None].expand(batch["labels"].shape)
    torch.testing.assert_close(model(**batch, mask_ratio=per_token).loss, expected, atol=1e-5, rtol=1e-5)


def test_the_number_of_items_divides_the_sum(model):
    total = sum(cross_entropies(model, c, m, 4).sum() for c, m in zip(CLEAN, MASKED, strict=True))
    for number in (7, torch.tensor(7)):
        loss = model(**batch_of(), num_items_in_batch=number).loss
        torch.testing.assert_close(loss, total / 7, atol=1e-5, rtol=1e-5)


def test_tokens_of_the_prompt_never_count(model):
    """They carry no label; the answer reads them clean."""
    noisy, labels = PAIRS[0]
    output = model(input_ids=torch.tensor([noisy]), labels=torch.tensor([labels]))
    log_probs = output.logits[0].log_softmax(-1)
    expected = -torch.stack([log_probs[index, CLEAN[0][index]] for index in MASKED[0]]).mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-5)
    nothing = model(input_ids=torch.tensor([CLEAN[0]]), labels=torch.full((1, 11), -100)).loss
    assert nothing == 0


def test_the_logits_are_those_of_the_noisy_sequence(model):
    batch = batch_of()
    assert model(**batch).logits.shape == (3, 11, VOCAB)
    # The first block sees nothing clean: it is what a forward pass over the noisy row gives.
    first = model(**{name: batch[name][:1] for name in ("input_ids", "attention_mask")}).logits[:, :4]
    torch.testing.assert_close(model(**batch).logits[:1, :4], first, atol=1e-5, rtol=1e-4)


def test_what_a_block_is_predicted_from_holds_none_of_its_own_clean_tokens(model):
    noisy, labels = (torch.tensor([row]) for row in PAIRS[0])
    other = labels.clone()
    other[0, 5] = 50  # in the second block
    changed = (model(noisy, labels=labels).logits - model(noisy, labels=other).logits).abs().amax(-1)[0] > 1e-5
    assert changed.tolist() == [False] * 8 + [True] * 3


def test_the_experts_of_a_layer_run_in_one_grouped_product():
    """The library's own grouped forward, not a loop over the experts."""
    assert new_model("sdar_moe").config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("experts_forward", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", SDAR_FAMILIES)
def test_a_gradient_reaches_every_parameter(family, experts_forward):
    model = new_model(family).train()
    if family == "sdar_moe":
        model.set_experts_implementation(experts_forward)
    pairs = [noised([(7 * i + 3 * row) % 59 for i in range(24)], list(range(row % 3, 24, 3))) for row in range(4)]
    model(**batch_of(pairs)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        if "experts" in name:
            assert (parameter.grad.flatten(1).abs().sum(-1) > 0).all(), name
    if family == "sdar_moe":
        assert any("gate.weight" in name for name, _ in model.named_parameters())


def test_the_router_s_loss_is_added_where_it_is_asked_for():
    model = new_model("sdar_moe")
    plain = model(**batch_of())
    output = model(**batch_of(), output_router_logits=True)
    assert plain.get("aux_loss") is None
    assert output.aux_loss > 0
    expected = plain.loss + model.config.router_aux_loss_coef * output.aux_loss
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-6)


def test_the_configuration_asks_for_the_router_s_loss_as_well():
    model = new_model("sdar_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    output = model(**batch_of())
    assert output.aux_loss > 0
    plain = new_model("sdar_moe")(**batch_of()).loss
    torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss, atol=1e-6, rtol=1e-6)


def test_the_router_s_loss_counts_both_halves_but_no_padding():
    model = new_model("sdar_moe")
    batch = batch_of()
    output = model(**batch, output_router_logits=True)
    twice = torch.cat([batch["attention_mask"]] * 2, dim=1)
    expected = load_balancing_loss_func(output.router_logits, 4, 2, twice)
    torch.testing.assert_close(output.aux_loss, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_router_s_loss_of_a_forward_without_labels_counts_no_padding():
    model = new_model("sdar_moe")
    batch = left_pad(CLEAN)
    output = model(**batch, output_router_logits=True)
    expected = load_balancing_loss_func(output.router_logits, 4, 2, batch["attention_mask"])
    torch.testing.assert_close(output.aux_loss, expected, atol=1e-6, rtol=1e-6)


def test_the_loss_comes_first_in_a_tuple(model):
    output = model(**batch_of())
    loss, logits = model(**batch_of(), return_dict=False)[:2]
    torch.testing.assert_close(loss, output.loss)
    assert logits.shape == output.logits.shape
    assert list(output.keys())[0] == "loss"
    torch.testing.assert_close(output[0], output.loss)


def test_inner_states_are_given_on_request(model):
    output = model(**batch_of(), output_hidden_states=True)
    assert len(output.hidden_states) == 3


@torch.no_grad()
def test_a_loss_without_gradients_is_the_same_under_flash_attention(model):
    """As in an evaluation: FlashAttention knows no such mask, and gives way."""
    noisy, labels = (torch.tensor([row]) for row in PAIRS[0])
    expected = model(input_ids=noisy, labels=labels).loss
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(input_ids=noisy, labels=labels).loss, expected)
    assert model.config._attn_implementation == "flash_attention_2"
