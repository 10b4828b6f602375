"""The training forward: all noisy blocks at once, each from the state that the clean blocks before it leave."""

import pytest
import torch
from torch.nn import functional as F

from dllm_hf.gla_dream import GLADreamCache
from dllm_hf.training.noising import mask_sequences

from ..builders import MASK, VOCAB, new_model, recorded
from ..noised_pairs import CLEAN, MASKED, PAIRS, assert_same_gradients, assert_same_loss, batch_of, gradients, noised


@pytest.fixture
def model(injection, shift):
    return new_model("gla_dream", inter_block_injection_mode=injection, logits_shift=shift)


def cross_entropies(model, clean: list[int], masked: list[int]) -> torch.Tensor:
    """From the definition: each noisy block after the clean ones before it, by itself, in a plain forward pass."""
    losses = []
    for start in range(0, len(clean), model.config.block_size):
        end = start + model.config.block_size
        noisy, labels = noised(clean, masked)
        logits = model(input_ids=torch.tensor([clean[:start] + noisy[start:end]])).logits[0]
        sources = (torch.arange(start, len(logits)) - model.logits_shift).clamp(min=0)
        losses.append(F.cross_entropy(logits[sources], torch.tensor(labels[start:end]), reduction="none"))
    return torch.cat(losses)[masked]


def all_cross_entropies(model) -> torch.Tensor:
    return torch.cat([cross_entropies(model, *pair) for pair in zip(CLEAN, MASKED, strict=True)])


# --- noise that the caller drew


@pytest.mark.parametrize(
    "changes",
    [{"block_size": 1}, {"block_size": 3}, {"share_inter_intra_gate_weights": True}, {"conv_size": 3}],
    ids=str,
)
def test_the_loss_of_a_pair_equals_its_definition_and_so_do_its_gradients(injection, shift, changes):
    model = new_model("gla_dream", inter_block_injection_mode=injection, logits_shift=shift, **changes)
    noisy, labels = PAIRS[0]
    loss = model(input_ids=torch.tensor([noisy]), labels=torch.tensor([labels])).loss
    assert_same_loss(model, loss, cross_entropies(model, CLEAN[0], MASKED[0]).mean())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(model, side):
    assert_same_loss(model, model(**batch_of(side=side)).loss, all_cross_entropies(model).mean())


def test_the_loss_of_a_row_with_holes_is_that_of_the_row_without(model):
    noisy, labels = PAIRS[0]
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0]])
    holed = {name: torch.full_like(mask, fill) for name, fill in (("input_ids", 5), ("labels", -100))}
    holed["input_ids"][mask == 1], holed["labels"][mask == 1] = torch.tensor(noisy), torch.tensor(labels)
    loss = model(**holed, attention_mask=mask).loss
    assert_same_loss(model, loss, cross_entropies(model, CLEAN[0], MASKED[0]).mean())


def test_the_loss_of_packed_samples_is_that_of_the_samples(model):
    tokens, labels = (torch.tensor([sum((pair[part] for pair in PAIRS), [])]) for part in (0, 1))
    positions = torch.tensor([[position for clean in CLEAN for position in range(len(clean))]])
    loss = model(input_ids=tokens, labels=labels, position_ids=positions).loss
    assert_same_loss(model, loss, all_cross_entropies(model).mean())


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_text_of_one_block_goes_without_its_clean_half_and_loses_the_same(model, length):
    tokens = torch.tensor([[3, MASK, 5, MASK][:length], [MASK, 6, 7, 8][:length]])
    labels = torch.where(tokens == MASK, 9, -100)
    ratio = torch.tensor([0.5, 0.25])
    with recorded(model.model.embed_tokens) as seen:
        short = model(tokens, labels=labels, mask_ratio=ratio)
        long = model(tokens, labels=labels, mask_ratio=ratio, position_ids=torch.arange(length)[None])
    assert [tuple(ids.shape) for ids in seen] == [(2, length), (4, length)]
    # What follows the block would be predicted from the clean text: with a shift the last logits are of no use here.
    used = length - model.logits_shift
    torch.testing.assert_close(short.logits[:, :used], long.logits[:, :used], atol=1e-5, rtol=1e-4)
    # Parameters that the state between blocks alone has get no gradient, or one of zeros.
    torch.testing.assert_close(short.loss, long.loss, atol=1e-6, rtol=1e-5)
    one, other = gradients(model, short.loss), gradients(model, long.loss)
    for name, gradient in other.items():
        expected = one.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: name + text)


def test_padded_texts_of_one_block_lose_the_same_as_with_their_clean_half(model):
    batch = {"input_ids": [[0, 0, MASK, 5], [3, MASK, 6, 7]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    batch = {name: torch.tensor(rows) for name, rows in batch.items()}
    batch["labels"] = torch.where(batch["input_ids"] == MASK, 9, -100)
    positions = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    short, long = model(**batch), model(**batch, position_ids=positions)
    torch.testing.assert_close(short.loss, long.loss, atol=1e-6, rtol=1e-5)
    real = (batch["attention_mask"] == 1) & (positions < 4 - model.logits_shift)
    torch.testing.assert_close(short.logits[real], long.logits[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("complementary", [False, True])
def test_noise_drawn_for_a_text_of_one_block_loses_the_same_as_with_its_clean_half(model, complementary):
    model.config.use_complementary_mask = complementary
    text, positions = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]), torch.arange(4)[None]
    losses = []
    for options in ({}, {"position_ids": positions, "attention_mask": torch.ones_like(text)}):
        torch.manual_seed(0)
        losses.append(model(text, labels=text.clone(), **options).loss)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)


def test_a_masking_probability_weighs_the_tokens(model):
    ratio = torch.tensor([0.5, 0.25, 0.8])
    losses = [cross_entropies(model, *pair) for pair in zip(CLEAN, MASKED, strict=True)]
    expected = sum(row.sum() / r for row, r in zip(losses, ratio, strict=True)) / sum(map(len, CLEAN))
    # In a row of its own each sample is padded nowhere.
    batches = [batch_of([pair]) for pair in PAIRS]
    each = [model(**batch, mask_ratio=r[None]).loss * len(c) for batch, r, c in zip(batches, ratio, CLEAN, strict=True)]
    torch.testing.assert_close(sum(each) / sum(map(len, CLEAN)), expected, atol=1e-5, rtol=1e-5)
    per_token = torch.linspace(0.1, 0.9, 11)
    expected = (cross_entropies(model, CLEAN[0], MASKED[0]) / per_token[MASKED[0]]).sum() / 11
    loss = model(**batches[0], mask_ratio=per_token[None]).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_number_of_items_divides_the_sum():
    model = new_model("gla_dream")
    for number in (7, torch.tensor(7)):
        loss = model(**batch_of(), num_items_in_batch=number).loss
        torch.testing.assert_close(loss, all_cross_entropies(model).sum() / 7, atol=1e-5, rtol=1e-5)


def test_the_logits_are_those_of_the_noisy_text(model):
    batch = batch_of()
    output = model(**batch)
    assert output.logits.shape == (3, 11, VOCAB)
    # The first block sees nothing clean: it is what a forward pass over the noisy row gives.
    first = model(input_ids=batch["input_ids"][:1]).logits[:, :3]
    torch.testing.assert_close(output.logits[:1, :3], first, atol=1e-5, rtol=1e-4)


def test_what_a_block_is_predicted_from_holds_none_of_its_own_clean_tokens(model):
    noisy, labels = (torch.tensor([row]) for row in PAIRS[0])
    other = labels.clone()
    other[0, 5] = 50  # in the second block
    changed = (model(noisy, labels=labels).logits - model(noisy, labels=other).logits).abs().amax(-1)[0] > 1e-5
    # Shifted, the logits at 7 are the prediction of the third block's first token.
    assert changed.tolist() == [False] * (8 - model.logits_shift) + [True] * (3 + model.logits_shift)


def test_nothing_labelled_gives_zero_not_nan():
    assert new_model("gla_dream")(torch.tensor([CLEAN[0]]), labels=torch.full((1, 11), -100)).loss == 0


# --- noise that the model draws


def drawn(model, clean: torch.Tensor, seed: int, **kwargs):
    """The noisy and the clean rows that a call on clean text feeds, and its output."""
    torch.manual_seed(seed)
    with recorded(model.model.embed_tokens) as seen, torch.no_grad():
        output = model(clean, **{"labels": clean.clone(), **kwargs})
    return seen[0][: -len(clean)], seen[0][-len(clean) :], output


TEXT = torch.tensor([[(7 * index + 3) % 59 for index in range(30)], [(5 * index + 1) % 59 for index in range(30)]])


@pytest.fixture(params=[False, True], ids=["one rate a sequence", "complementary"])
def noising(request):
    return new_model("gla_dream", use_complementary_mask=request.param)


def test_the_noise_of_clean_text_is_drawn_and_a_seed_draws_it_again(noising):
    noisy, clean, output = drawn(noising, TEXT, seed=1)
    assert torch.equal(clean, TEXT)
    assert (noisy == MASK).any() and (noisy != MASK).any()
    assert set(noisy[noisy != clean.repeat(len(noisy) // 2, 1)].tolist()) == {MASK}
    again, _, output_again = drawn(noising, TEXT, seed=1)
    assert torch.equal(again, noisy) and torch.equal(output_again.loss, output.loss)
    assert not torch.equal(drawn(noising, TEXT, seed=2)[0], noisy)


def test_prompts_and_padding_are_never_noised(noising):
    labels, mask = TEXT.clone(), torch.ones_like(TEXT)
    labels[0, :10] = -100
    mask[1, :7] = 0
    given = (labels == -100) | (mask == 0)
    for seed in range(20):
        noisy, _, _ = drawn(noising, TEXT, seed, labels=labels, attention_mask=mask)
        assert not (noisy == MASK)[given.repeat(len(noisy) // 2, 1)].any()


def test_complementary_masks_cover_each_labelled_token_exactly_once():
    model, labels = new_model("gla_dream", use_complementary_mask=True), TEXT.clone()
    labels[0, :10] = -100
    noisy, _, _ = drawn(model, TEXT, seed=0, labels=labels)
    one, other = (noisy == MASK).chunk(2)
    assert torch.equal(one ^ other, labels != -100)


def test_the_loss_of_complementary_masks_is_the_mean_over_all_tokens():
    model = new_model("gla_dream", use_complementary_mask=True, logits_shift=1)
    noisy, _, output = drawn(model, TEXT, seed=0)
    total = sum(
        model(rows, labels=torch.where(rows == MASK, TEXT, -100), num_items_in_batch=1).loss for rows in noisy.chunk(2)
    )
    torch.testing.assert_close(output.loss, total.detach() / TEXT.numel(), atol=1e-5, rtol=1e-5)
    assert output.logits.shape == (*TEXT.shape, VOCAB)


def test_the_loss_of_one_rate_a_sequence_is_weighted_by_its_inverse():
    model, labels = new_model("gla_dream"), TEXT.clone()
    labels[0, :10] = -100
    _, _, output = drawn(model, TEXT, seed=3, labels=labels)
    torch.manual_seed(3)
    noisy, noisy_labels, rates = mask_sequences(TEXT, labels != -100, MASK)
    expected = model(noisy, labels=noisy_labels, mask_ratio=rates, num_items_in_batch=50).loss
    torch.testing.assert_close(output.loss, expected.detach())


def test_the_number_of_items_divides_the_drawn_loss(noising):
    loss = drawn(noising, TEXT, seed=0)[2].loss
    divided = drawn(noising, TEXT, seed=0, num_items_in_batch=torch.tensor(6))[2].loss
    torch.testing.assert_close(divided * 6, loss * TEXT.numel())


def test_noise_is_drawn_where_a_text_does_not_begin_at_position_0(noising):
    positions = torch.arange(100, 130)[None]
    noisy, clean, _ = drawn(noising, TEXT, seed=1, position_ids=positions)
    assert (noisy == MASK).any() and torch.equal(clean, TEXT)


# --- what training needs


@pytest.mark.parametrize("noise", [{}, {"use_complementary_mask": True}], ids=["rate", "complementary"])
def test_a_gradient_reaches_every_parameter(injection, shared, noise):
    changes = {"inter_block_injection_mode": injection, "share_inter_intra_gate_weights": shared, **noise}
    model = new_model("gla_dream", attention_bias=True, **changes).train()
    torch.manual_seed(0)
    model(TEXT, labels=TEXT.clone()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_no_gradient(model):
    model.train()
    loss = model(**batch_of()).loss
    expected = gradients(model, loss)
    model.gradient_checkpointing_enable()
    again = model(**batch_of()).loss
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients(model, again), expected)


def test_autocast_changes_the_loss_a_little():
    model = new_model("gla_dream")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch_of()).loss, atol=0, rtol=0.02)


def test_the_loss_comes_first_in_a_tuple():
    model = new_model("gla_dream")
    output = model(**batch_of())
    loss, logits = model(**batch_of(), return_dict=False)[:2]
    torch.testing.assert_close(loss, output.loss, atol=0, rtol=0)
    torch.testing.assert_close(logits, output.logits, atol=0, rtol=0)


def test_inner_states_are_those_of_the_noisy_text(model):
    output = model(**batch_of(), output_hidden_states=True)
    assert [x.shape for x in output.hidden_states] == [(3, 11, 32)] * 3


@pytest.mark.parametrize("use_cache", [False, True])
def test_training_keeps_no_cache_whatever_is_asked_for(use_cache):
    model = new_model("gla_dream")
    output = model(**batch_of(), use_cache=use_cache)
    assert output.past_key_values is None
    torch.testing.assert_close(output.loss, model(**batch_of()).loss, atol=0, rtol=0)


# --- what is refused

TOKENS = torch.tensor([PAIRS[0][0]])
LABELS = torch.tensor([PAIRS[0][1]])


def test_labels_of_another_shape_are_refused():
    for labels in (LABELS[:, :-1], LABELS[0], LABELS.repeat(2, 1)):
        with pytest.raises(ValueError, match="`labels`.*same shape"):
            new_model("gla_dream")(input_ids=TOKENS, labels=labels)


def test_labels_without_tokens_are_refused():
    model = new_model("gla_dream")
    with pytest.raises(ValueError, match="`labels` needs `input_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(TOKENS), labels=LABELS)


def test_labels_with_a_4d_mask_are_refused():
    with pytest.raises(ValueError, match="`attention_mask`"):
        new_model("gla_dream")(input_ids=TOKENS, labels=LABELS, attention_mask=torch.zeros(1, 1, 11, 11))


def test_labels_with_a_cache_are_refused():
    model = new_model("gla_dream")
    with pytest.raises(ValueError, match="`past_key_values` and `labels`"):
        model(input_ids=TOKENS, labels=LABELS, past_key_values=GLADreamCache(model))


def test_clean_text_needs_a_mask_token():
    with pytest.raises(ValueError, match="`mask_token_id`"):
        new_model("gla_dream", mask_token_id=None)(TEXT, labels=TEXT.clone())


@pytest.mark.parametrize("positions", [torch.arange(4)[None], torch.arange(5.0)[None]])
def test_positions_that_do_not_fit_are_refused_by_name(positions):
    with pytest.raises(
        ValueError, match=r"`position_ids` must be integers, `\(batch, length\)` = \(1, 5\), but are \(1, "
    ):
        new_model("gla_dream")(torch.tensor([[5, 6, 7, 8, 9]]), position_ids=positions)
