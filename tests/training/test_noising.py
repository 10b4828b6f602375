"""Which tokens of a clean text become masks."""

import pytest
import torch

from dllm_hf.training.noising import EPS, mask_complementary, mask_sequences

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
