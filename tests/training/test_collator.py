"""Batches for the trainer: what is masked, what is counted, what is padded."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import TrainerState

from dllm_hf.training import DataCollatorForMaskedDiffusion, collator
from dllm_hf.training.noising import EPS, context_weights, mask_complementary

from ..builders import BUILDERS, END, MASK, PAD, character_tokenizer, new_model

TOKENIZER = character_tokenizer()
SCHEDULES = {"llada": {}, "dream": {}, "complementary": {"block_size": 4}}
WEIGHTINGS = ("1/t", "1-t", "cart", "none")


def collator_of(schedule: str = "llada", **options) -> DataCollatorForMaskedDiffusion:
    return DataCollatorForMaskedDiffusion(TOKENIZER, schedule, **{"seed": 0, **SCHEDULES[schedule], **options})


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> str:
    return request.param


@pytest.fixture(params=BUILDERS)
def any_family(request) -> str:
    return request.param


def feature(length: int, prompt: int = 0, first: int = 0) -> dict[str, list[int]]:
    tokens = [(first + 7 * index) % MASK for index in range(length)]
    return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}


def ragged() -> list[dict[str, list[int]]]:
    return [feature(20, 5, 1), feature(13, 0, 2), feature(17, 16, 3), feature(8, 2, 4)]


def packed(*lengths: int) -> dict[str, list[int]]:
    texts = [feature(length, first=number) for number, length in enumerate(lengths)]
    row = {name: sum((text[name] for text in texts), []) for name in ("input_ids", "labels")}
    return {**row, "position_ids": [position for length in lengths for position in range(length)]}


def shares(batch) -> torch.Tensor:
    """`(rows,)`: how much of each row is masked."""
    return (batch["input_ids"] == MASK).float().mean(-1)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- how much is masked


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_half_of_all_tokens_are_masked_and_each_row_at_its_own_rate(name):
    rows, length = 64, 512
    batch = collator_of(name)([feature(length, first=row) for row in range(rows)])
    masked = shares(batch)
    # Of a rate in each of 64 slices, and of the tokens, whose variance t * (1 - t) is 1 / 6 on average.
    deviation = (1 / 12 / rows**3 + 1 / 6 / (rows * length)) ** 0.5
    assert masked.mean().item() == pytest.approx((1 + EPS) / 2, abs=4 * deviation)
    slices = EPS + (1 - EPS) * (torch.arange(rows) + 0.5) / rows
    tolerance = 0.5 / rows + 4 * (0.25 / length) ** 0.5
    torch.testing.assert_close(masked.sort().values, slices, atol=tolerance, rtol=0)


def test_half_of_all_tokens_are_masked_in_either_view_and_each_block_at_its_own_rate():
    rows, length, size = 16, 1024, 64
    batch = collator_of("complementary", block_size=size)([feature(length, first=row) for row in range(rows)])
    blocks = rows * length // size
    deviation = (1 / 12 / blocks + 1 / 6 / (rows * length)) ** 0.5
    for view in shares(batch).chunk(2):
        assert view.mean().item() == pytest.approx((1 + EPS) / 2, abs=4 * deviation)
    of_blocks = (batch["input_ids"][:rows] == MASK).float().view(blocks, size).mean(-1)
    expected = torch.linspace(0.1, 0.9, 9)
    # Of 256 uniform rates, read from 64 tokens each.
    tolerance = 4 * (0.25 / blocks) ** 0.5 + 0.02
    torch.testing.assert_close(of_blocks.quantile(expected), expected, atol=tolerance, rtol=0)


def test_the_mask_ratio_of_llada_is_the_rate_that_a_row_was_masked_at():
    batch = collator_of()([feature(4000, first=row) for row in range(8)])
    for row, share in enumerate(shares(batch)):
        ratio = batch["mask_ratio"][row][batch["input_ids"][row] == MASK].unique()
        assert len(ratio) == 1
        assert ratio.item() == pytest.approx(share.item(), abs=4 * (0.25 / 4000) ** 0.5)


# --- what is never masked

texts = st.integers(1, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length)))


@given(
    rows=st.lists(texts, min_size=1, max_size=5),
    name=st.sampled_from(list(SCHEDULES)),
    multiple=st.sampled_from([None, 1, 8]),
    eos_padding=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_prompts_and_padding_are_never_masked_and_nothing_else_changes(rows, name, multiple, eos_padding, seed):
    features = [feature(length, prompt, row) for row, (length, prompt) in enumerate(rows)]
    options = {"eos_padding": eos_padding, "pad_to_multiple_of": multiple, "seed": seed}
    batch = collator_of(name, **options)(features)
    views = len(batch["input_ids"]) // len(rows)
    assert views == (2 if name == "complementary" else 1)
    for index, noisy in enumerate(batch["input_ids"].tolist()):
        text, prompt = features[index % len(rows)]["input_ids"], rows[index % len(rows)][1]
        padding = len(noisy) - len(text)
        clean = text + [END if eos_padding else PAD] * padding
        learnt = [False] * prompt + [True] * (len(text) - prompt) + [eos_padding] * padding
        labels, ratio = batch["labels"][index].tolist(), batch["mask_ratio"][index]
        for place, token in enumerate(clean):
            assert noisy[place] == token or (noisy[place] == MASK and learnt[place])
            assert labels[place] in (token, -100) and (learnt[place] or labels[place] == -100)
            # A mask has a label; what has none or is no mask weighs nothing, and what has none is not counted either.
            assert noisy[place] != MASK or (labels[place] == token and ratio[place] > 0)
            assert noisy[place] == MASK or labels[place] == -100 or ratio[place] == torch.inf
            assert labels[place] != -100 or ratio[place] == 0
        if name == "llada":
            assert [label != -100 for label in labels] == learnt
        assert batch["attention_mask"][index].tolist() == [1] * len(text) + [int(eos_padding)] * padding
    assert batch["input_ids"].shape[1] % (multiple or 1) == 0


@given(rows=st.lists(texts, min_size=1, max_size=5), size=st.sampled_from([1, 3, 4, 32]), seed=st.integers(0, 1000))
def test_complementary_views_mask_each_token_to_learn_exactly_once(rows, size, seed):
    features = [feature(length, prompt, row) for row, (length, prompt) in enumerate(rows)]
    batch = collator_of("complementary", block_size=size, seed=seed)(features)
    one, other = (batch["input_ids"] == MASK).chunk(2)
    for index, (length, prompt) in enumerate(rows):
        learnt = torch.arange(one.shape[1])
        assert torch.equal(one[index] ^ other[index], (learnt >= prompt) & (learnt < length))
    assert torch.equal(batch["labels"] != -100, batch["input_ids"] == MASK)


# --- what the loss of a batch is


def cross_entropies(model, batch) -> torch.Tensor:
    """`(batch, length)`, of what the model says of the clean token wherever a mask stands, else 0."""
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}).logits
    losses = torch.zeros(batch["input_ids"].shape)
    for row, column in (batch["input_ids"] == MASK).nonzero().tolist():
        source = max(column - model.logits_shift, 0)
        losses[row, column] = cross_entropy(logits[row, source], batch["labels"][row, column])
    return losses


@torch.no_grad()
def test_the_loss_of_llada_is_that_of_the_masks_over_their_rate_divided_by_all_tokens_to_learn(family):
    model, features = new_model(family), ragged()
    batch = collator_of()(features)
    ratio = batch["mask_ratio"]
    rates = torch.where(ratio.isfinite(), ratio, 0).amax(-1).clamp(min=EPS)  # of a row without masks it is not known
    answers = sum(label != -100 for one in features for label in one["labels"])
    expected = (cross_entropies(model, batch) / rates[:, None]).sum() / answers
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@torch.no_grad()
def test_the_loss_of_dream_is_that_of_the_masks_by_their_weight_divided_by_their_number(weighting, family):
    model, features = new_model(family), ragged()
    batch = collator_of("dream", weighting=weighting)(features)
    rates = collator_of("dream")(features)["mask_ratio"].amax(-1, keepdim=True).clamp(min=EPS)  # the same noise
    masked = batch["input_ids"] == MASK
    known = ~masked & batch["attention_mask"].bool()
    weights = {"1/t": 1 / rates, "1-t": 1 - rates, "none": 1.0, "cart": context_weights(known, 0.1)}[weighting]
    expected = (cross_entropies(model, batch) * weights).sum() / masked.sum()
    torch.testing.assert_close(model(**batch).loss, expected)


@torch.no_grad()
def test_the_loss_of_complementary_views_is_the_mean_over_all_tokens_to_learn(family):
    model, features = new_model(family), ragged()
    batch = collator_of("complementary")(features)
    answers = sum(label != -100 for one in features for label in one["labels"])
    torch.testing.assert_close(model(**batch).loss, cross_entropies(model, batch).sum() / answers)


@pytest.mark.parametrize("eos_padding", [False, True])
@torch.no_grad()
def test_what_the_trainer_counts_is_what_the_loss_is_divided_by(schedule, eos_padding):
    model, batch = new_model("llada"), collator_of(schedule, eos_padding=eos_padding)(ragged())
    number = (batch["labels"] != -100).sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=number).loss, model(**batch).loss)


@torch.no_grad()
def test_a_text_without_known_tokens_has_context_weights_of_zero_and_a_finite_loss():
    collator = collator_of("dream", weighting="cart")
    for seed in range(50):  # a rate of a half masks both of two tokens now and then
        collator.seed = seed
        batch = collator([feature(2)])
        loss = new_model("llada")(**batch).loss
        assert loss.isfinite()
        if (batch["input_ids"] == MASK).all():
            assert loss == 0
            return
    raise AssertionError("no text was masked as a whole")


def test_cart_p_reaches_the_weights():
    batch = collator_of("dream", weighting="cart", cart_p=0.8)([feature(30)])
    masked = batch["input_ids"] == MASK
    torch.testing.assert_close((1 / batch["mask_ratio"])[masked], context_weights(~masked, 0.8)[masked])


# --- padding and other input


def test_a_batch_is_as_long_as_its_longest_text_or_the_next_multiple():
    assert collator_of()(ragged())["input_ids"].shape == (4, 20)
    assert collator_of(pad_to_multiple_of=16)(ragged())["input_ids"].shape == (4, 32)
    assert collator_of(pad_to_multiple_of=5)(ragged())["input_ids"].shape == (4, 20)


def test_every_batch_has_the_same_columns(schedule):
    padded, even = (collator_of(schedule)(rows) for rows in (ragged(), [feature(6), feature(6)]))
    assert set(padded) == set(even) == {"input_ids", "labels", "mask_ratio", "attention_mask"}
    assert even["attention_mask"].all()


def test_end_of_sequence_padding_is_learnt_like_the_text():
    batch = collator_of(eos_padding=True)(ragged())
    assert batch["attention_mask"].all()
    assert batch["labels"][3].tolist() == ragged()[3]["labels"] + [END] * 12


def test_padding_that_an_attention_mask_marks_is_taken_away(schedule):
    plain = collator_of(schedule)(ragged())
    padded = []
    for left, one in enumerate(ragged()):
        sides = lambda values, filler, left=left: [filler] * left + values + [filler] * 3
        padded.append(
            {
                "input_ids": sides(one["input_ids"], PAD),
                "labels": sides(one["labels"], PAD),  # would be learnt, were it not for the attention mask
                "attention_mask": sides([1] * len(one["input_ids"]), 0),
            }
        )
    assert same(collator_of(schedule)(padded), plain)


def test_lists_and_tensors_are_the_same_to_it(schedule):
    tensors = [{name: torch.tensor(values) for name, values in one.items()} for one in ragged()]
    small = [{name: values.to(torch.int32) for name, values in one.items()} for one in tensors]
    arrays = [{name: values.numpy() for name, values in one.items()} for one in tensors]
    expected = collator_of(schedule)(ragged())
    assert all(same(collator_of(schedule)(features), expected) for features in (tensors, small, arrays))


def test_without_labels_the_whole_text_is_learnt(schedule):
    labelled = [feature(9), feature(6)]
    alone = [{"input_ids": one["input_ids"]} for one in labelled]
    assert same(collator_of(schedule)(alone), collator_of(schedule)(labelled))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_or_with_zeros():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    batch = DataCollatorForMaskedDiffusion(tokenizer, seed=0)([feature(6), feature(4)])
    assert batch["input_ids"][1, 4:].tolist() == [END, END]
    tokenizer.eos_token = None
    batch = DataCollatorForMaskedDiffusion(tokenizer, seed=0)([feature(6), feature(4)])
    assert batch["input_ids"][1, 4:].tolist() == [0, 0]


@pytest.mark.parametrize("name", [None, "<mask>"])
def test_the_mask_token_may_be_given(name):
    """LLaDA's published tokenizer has a mask among its added tokens, and no `mask_token`."""
    tokenizer = character_tokenizer()
    tokenizer.mask_token = name
    batch = DataCollatorForMaskedDiffusion(tokenizer, mask_token_id=63, seed=0)([feature(50)])
    assert (batch["input_ids"] == 63).any() and not (batch["input_ids"] == MASK).any()


EMPTY, EMPTY_PACKED = {"input_ids": [], "labels": []}, {"input_ids": [], "labels": [], "position_ids": []}
ALL_PADDING = {**feature(3), "attention_mask": [0, 0, 0]}


@pytest.mark.parametrize(
    "rows", [[feature(9), EMPTY], [EMPTY, feature(5)], [packed(4, 3), EMPTY_PACKED], [ALL_PADDING, feature(2)]]
)
def test_an_empty_text_is_a_row_of_padding(rows, schedule):
    empty = [index for index, row in enumerate(rows) if row in (EMPTY, EMPTY_PACKED, ALL_PADDING)]
    batch = collator_of(schedule)(rows)
    for view in range(len(batch["input_ids"]) // len(rows)):
        for index in empty:
            row = view * len(rows) + index
            assert batch["input_ids"][row].eq(PAD).all() and batch["labels"][row].eq(-100).all()
            assert not batch["attention_mask"][row].any() and not batch["mask_ratio"][row].any()


@pytest.mark.parametrize(
    "rows", [[feature(9), EMPTY], [EMPTY], [EMPTY, EMPTY], [packed(4, 3), EMPTY_PACKED], [EMPTY_PACKED], [ALL_PADDING]]
)
def test_every_family_takes_empty_texts(rows, any_family, schedule):
    model, batch = new_model(any_family).train(), collator_of(schedule)(rows)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
    if (batch["labels"] == -100).all():
        assert loss == 0


# --- packed samples


def test_positions_of_packed_samples_pass_through(schedule):
    rows = [packed(5, 3, 4), packed(7, 2)]
    batch = collator_of(schedule)(rows)
    views = 2 if schedule == "complementary" else 1
    expected = torch.tensor([rows[0]["position_ids"], rows[1]["position_ids"] + [0] * 3])
    assert torch.equal(batch["position_ids"], expected.repeat(views, 1))
    assert torch.equal(batch["attention_mask"].sum(-1), torch.tensor([12, 9]).repeat(views))


def test_packed_samples_have_rates_of_their_own():
    batch = collator_of()([packed(300, 500, 200), packed(400, 400)])
    rates = []
    for row, parts in ((0, (300, 500, 200)), (1, (400, 400))):
        masked = batch["input_ids"][row, : sum(parts)] == MASK
        for noisy, ratio in zip(masked.split(parts), batch["mask_ratio"][row, : sum(parts)].split(parts)):
            assert len(ratio[noisy].unique()) == 1
            rates.append(ratio[noisy][0].item())
            assert noisy.float().mean().item() == pytest.approx(rates[-1], abs=4 * (0.25 / len(noisy)) ** 0.5)
    assert sorted(int(5 * (rate - EPS) / (1 - EPS)) for rate in rates) == [0, 1, 2, 3, 4]


def test_context_weights_stop_at_the_end_of_a_sample():
    batch = collator_of("dream", weighting="cart")([packed(6, 9)])
    masked = batch["input_ids"] == MASK
    samples = torch.tensor([[0] * 6 + [1] * 9])
    expected = context_weights(~masked, 0.1, samples)
    torch.testing.assert_close((1 / batch["mask_ratio"])[masked], expected[masked])


def test_packed_samples_have_blocks_of_their_own(monkeypatch):
    seen = []

    def note(tokens, maskable, mask_token_id, blocks, generator):
        seen.append(blocks)
        return mask_complementary(tokens, maskable, mask_token_id, blocks, generator)

    monkeypatch.setattr(collator, "mask_complementary", note)
    collator_of("complementary", block_size=4)([packed(6, 3, 5)])
    assert seen[0].tolist() == [[1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5]]


@torch.no_grad()
def test_packed_rows_of_unequal_length_have_a_finite_loss_in_every_family(any_family, schedule):
    batch = collator_of(schedule)([packed(5, 3, 4), packed(7, 2)])
    assert new_model(any_family)(**batch).loss.isfinite()


# --- where noise comes from


def noise(collator, epoch: float | None = None, features=None) -> torch.Tensor:
    if epoch is not None:
        collator.on_epoch_begin(None, TrainerState(epoch=epoch), None)
    return collator(features or ragged())["input_ids"]


def test_noise_is_a_function_of_seed_epoch_and_batch(schedule):
    first = noise(collator_of(schedule))
    torch.manual_seed(5)
    assert torch.equal(noise(collator_of(schedule), 0), first)
    assert not torch.equal(noise(collator_of(schedule), 1), first)
    assert not torch.equal(noise(collator_of(schedule, seed=1)), first)
    # The same rows in another order are another batch.
    assert not torch.equal(noise(collator_of(schedule), features=ragged()[::-1]).flip(0), first)


def test_an_epoch_that_was_left_in_the_middle_has_its_noise_again():
    assert torch.equal(noise(collator_of(), 2.75), noise(collator_of(), 2))


def test_seeded_noise_leaves_pytorch_s_generator_alone(schedule):
    state = torch.get_rng_state()
    noise(collator_of(schedule))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_pytorch_s_generator_draws(schedule):
    collator = collator_of(schedule, seed=None)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(noise(collator))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(noise(collator), draws[2])


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**64 + 3])
def test_any_integer_is_a_seed(seed):
    assert torch.equal(noise(collator_of(seed=seed)), noise(collator_of(seed=seed)))


def test_a_collator_can_be_pickled():
    collator = collator_of("complementary", seed=3)
    collator.on_epoch_begin(None, TrainerState(epoch=1.0), None)
    copy = pickle.loads(pickle.dumps(collator))
    assert same(copy(ragged()), collator(ragged()))


def test_workers_make_the_same_batches_in_every_epoch():
    features = ragged() * 2
    collators = [collator_of(), collator_of()]
    here = DataLoader(features, 2, collate_fn=collators[0])
    workers = DataLoader(features, 2, collate_fn=collators[1], num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0.0, 1.0):
        for each in collators:
            each.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        expected = list(here)
        assert all(same(one, other) for one, other in zip(workers, expected, strict=True))
        epochs.append(expected)
    assert not any(same(one, other) for one, other in zip(*epochs))
