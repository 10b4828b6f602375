"""Which tokens of a clean text become masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf.training.noising import EPS, context_weights, draw_rates, mask_complementary, mask_sequences

MASK = 99
BLOCKS = (torch.arange(2000) // 100)[None]


def text(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows * length).view(rows, length) % 90


def one_rate(tokens, maskable):
    return mask_sequences(tokens, maskable, MASK)[:2]


def complementary(tokens, maskable):
    return mask_complementary(tokens, maskable, MASK, torch.arange(tokens.shape[1])[None] // 4)


@pytest.fixture(params=[one_rate, complementary])
def noise(request):
    torch.manual_seed(0)
    return request.param


def test_a_label_is_the_clean_token_where_a_mask_stands_and_nothing_else_changes(noise):
    tokens = text(3, 50)
    noisy, labels = noise(tokens, torch.ones_like(tokens, dtype=torch.bool))
    clean = tokens.repeat(len(noisy) // 3, 1)
    assert torch.equal(labels != -100, noisy == MASK)
    assert torch.equal(torch.where(noisy == MASK, labels, noisy), clean)


def test_what_is_not_maskable_stays(noise):
    tokens = text(3, 50)
    maskable = torch.arange(50).expand(3, -1) % 3 == 0
    noisy, labels = noise(tokens, maskable)
    assert (noisy == MASK).any()
    assert not (noisy == MASK)[~maskable.repeat(len(noisy) // 3, 1)].any()
    assert (labels[~maskable.repeat(len(noisy) // 3, 1)] == -100).all()


def test_a_seed_draws_the_same_noise_again(noise):
    tokens = text(3, 50)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(noise(tokens, everything)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_each_sequence_is_masked_at_its_own_rate():
    torch.manual_seed(0)
    tokens = text(20, 2000)
    noisy, _, rates = mask_sequences(tokens, torch.ones_like(tokens, dtype=torch.bool), MASK)
    assert rates.min() >= EPS and rates.max() <= 1
    assert rates.min() < 0.2 and rates.max() > 0.8
    torch.testing.assert_close((noisy == MASK).float().mean(-1), rates, atol=0.05, rtol=0)


def test_the_second_mask_is_the_first_one_inverted():
    torch.manual_seed(0)
    tokens = text(3, 50)
    maskable = torch.arange(50).expand(3, -1) > 10
    one, other = (mask_complementary(tokens, maskable, MASK, BLOCKS[:, :50])[0] == MASK).chunk(2)
    assert torch.equal(one ^ other, maskable)


def test_each_block_is_masked_at_its_own_rate():
    torch.manual_seed(0)
    tokens = text(2, 2000)
    noisy, _ = mask_complementary(tokens, torch.ones_like(tokens, dtype=torch.bool), MASK, BLOCKS)
    rates = (noisy[:2] == MASK).float().view(2, 20, 100).mean(-1)
    assert rates.std() > 0.2  # that of one rate for all would be below 0.05
    assert not torch.allclose(rates[0], rates[1], atol=0.1)


# --- rates


@given(number=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_each_of_equal_slices_holds_one_rate(number, seed):
    rates = draw_rates(number, "cpu", torch.Generator().manual_seed(seed))
    within = (rates.sort().values - EPS) / (1 - EPS) * number - torch.arange(number)
    assert within.min() > -1e-4 and within.max() < 1 + 1e-4  # of its slice, but for float32
    assert rates.min() >= EPS and rates.max() <= 1


def test_the_rate_of_any_place_in_a_batch_is_uniform():
    generator = torch.Generator().manual_seed(0)
    rates = torch.stack([draw_rates(4, "cpu", generator) for _ in range(4000)])
    expected = EPS + (1 - EPS) * torch.linspace(0.1, 0.9, 9)
    # A share p of n draws is off by less than 4 * sqrt(p * (1 - p) / n), all but one time in 16,000.
    tolerance = 4 * (0.25 / 4000) ** 0.5
    for place in rates.T:
        torch.testing.assert_close(place.quantile(torch.linspace(0.1, 0.9, 9)), expected, atol=tolerance, rtol=0)


def test_no_sequences_have_no_rates():
    assert draw_rates(0, "cpu").shape == (0,)


def test_a_generator_draws_the_same_noise_again_and_leaves_the_global_one_alone():
    tokens = text(3, 50)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    blocks = torch.arange(50)[None] // 4
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for draw in (
        lambda generator: mask_sequences(tokens, everything, MASK, None, generator)[0],
        lambda generator: mask_complementary(tokens, everything, MASK, blocks, generator)[0],
        lambda generator: draw_rates(7, "cpu", generator),
    ):
        one, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- packed samples

SAMPLES = torch.tensor([[0] * 1000 + [1] * 700 + [2] * 300, [0] * 2000])


def test_packed_samples_are_masked_at_rates_of_their_own():
    tokens = text(2, 2000)
    noisy, _, rates = mask_sequences(
        tokens, torch.ones_like(tokens, dtype=torch.bool), MASK, SAMPLES, torch.Generator().manual_seed(0)
    )
    assert rates.shape == tokens.shape
    seen = []
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        sample = SAMPLES[row] == number
        rate = rates[row][sample].unique()
        assert len(rate) == 1
        share = (noisy[row][sample] == MASK).float().mean().item()
        assert share == pytest.approx(rate.item(), abs=4 * (0.25 / sample.sum().item()) ** 0.5)
        seen.append(rate.item())
    assert sorted(int(rate * 4) for rate in seen) == [0, 1, 2, 3]  # stratified over all samples of the batch


# --- context-adaptive weights


def naive_context_weight(known: list[bool], samples: list[int], p: float, n: int) -> float:
    return 0.5 * sum(
        p * (1 - p) ** (abs(n - m) - 1) for m in range(len(known)) if m != n and known[m] and samples[m] == samples[n]
    )


rows = st.integers(1, 12).flatmap(
    lambda length: st.tuples(
        st.lists(st.booleans(), min_size=length, max_size=length),
        st.lists(st.booleans(), min_size=length, max_size=length),
    )
)


@given(row=rows, p=st.sampled_from([0.1, 0.3, 0.8, 1.0]))
def test_context_weights_equal_the_sum_over_known_tokens(row, p):
    known, begins = row
    samples = torch.tensor(begins).long().cumsum(0)
    samples = (samples - samples[0]).tolist()
    alone = context_weights(torch.tensor([known]), p)[0]
    packed = context_weights(torch.tensor([known]), p, torch.tensor([samples]))[0]
    for n in range(len(known)):
        assert alone[n].item() == pytest.approx(naive_context_weight(known, [0] * len(known), p, n), rel=1e-5)
        assert packed[n].item() == pytest.approx(naive_context_weight(known, samples, p, n), rel=1e-5)


def test_a_mask_between_known_tokens_weighs_more_than_one_at_the_end():
    known = torch.tensor([[True, False, True, True, False, False, False]])
    weights = context_weights(known, 0.3)[0]
    assert weights[1] > weights[4] > weights[5] > weights[6] > 0
