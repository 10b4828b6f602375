"""Quotas and selection rules, against their definitions written out for one row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf.generation.remasking import STRATEGIES, bernoulli_plan, bernoulli_quotas, select, transfer_quotas

EPS = 1e-3


def quotas(masks, steps, strategy="low_confidence_static"):
    return transfer_quotas([masks], [steps], STRATEGIES[strategy], EPS)[0].tolist()


def choose(strategy, confidence, quota=1, masked=None, threshold=0.9, entropy_bound=0.1, factor=1.0, **noise):
    """The positions that a step transfers in one row."""
    confidence = torch.tensor([confidence], dtype=torch.float32)
    masked = torch.ones_like(confidence, dtype=torch.bool) if masked is None else torch.tensor([masked])
    rules = {"threshold": threshold, "entropy_bound": entropy_bound, "factor": factor}
    chosen = select(STRATEGIES[strategy], confidence, masked, torch.tensor([quota]), **rules, **noise)
    return chosen[0].nonzero().flatten().tolist()


# --- quotas


@pytest.mark.parametrize(
    "masks, steps, expected",
    [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (3, 5, [1, 1, 1]), (5, 1, [5]), (4, None, [1, 1, 1, 1]), (0, 3, [])],
)
def test_uniform_quotas_put_the_remainder_on_the_first_steps(masks, steps, expected):
    assert quotas(masks, steps) == expected


@given(masks=st.integers(0, 70), steps=st.integers(1, 70), strategy=st.sampled_from(["low_confidence", "entropy"]))
def test_quotas_transfer_every_mask(masks, steps, strategy):
    given_quotas = quotas(masks, steps, strategy)
    assert sum(given_quotas) == masks
    assert min(given_quotas, default=0) >= 0
    assert len(given_quotas) <= steps


@pytest.mark.parametrize("strategy", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("masks, steps", [(16, 16), (20, 8), (16, 24), (12, 5), (128, 512), (1, 1)])
def test_timestep_quotas_are_those_of_dream(masks, steps, strategy):
    timesteps = torch.linspace(1, EPS, steps + 1)
    expected, left = [], masks
    for i in range(steps):
        share = left * (1 - timesteps[i + 1] / timesteps[i])
        expected.append(int(share) if i < steps - 1 else left)
        left -= expected[-1]
    assert quotas(masks, steps, strategy) == expected


def test_quotas_belong_to_their_row():
    strategy = STRATEGIES["maskgit_plus"]
    together = transfer_quotas([3, 0, 7], [5, 5, 2], strategy, EPS)
    for row, (masks, steps) in enumerate([(3, 5), (0, 5), (7, 2)]):
        alone = transfer_quotas([masks], [steps], strategy, EPS)[0].tolist()
        assert together[row].tolist() == alone + [0] * (5 - len(alone))


def test_a_bernoulli_plan_has_the_probabilities_of_deciding_step_by_step():
    steps, positions = 6, 200_000
    plan = bernoulli_plan(torch.rand(1, positions, generator=torch.Generator().manual_seed(0)), [steps], EPS)[0]
    timesteps = torch.linspace(1, EPS, steps + 1)
    still_masked = torch.ones_like(plan, dtype=torch.bool)
    for step in range(steps):
        share = (plan[still_masked] == step).float().mean().item()
        probability = 1.0 if step == steps - 1 else 1 - (timesteps[step + 1] / timesteps[step]).item()
        deviation = math.sqrt(max(probability * (1 - probability), 1e-9) / still_masked.sum().item())
        assert abs(share - probability) < 5 * deviation
        still_masked &= plan > step
    assert not still_masked.any()


def test_a_bernoulli_plan_says_beforehand_how_much_each_step_transfers():
    plan = torch.tensor([[0, 2, 2, 1], [3, 0, 0, 0]])
    masked = torch.tensor([[True, True, True, False], [True, True, False, True]])
    assert bernoulli_quotas(plan, masked).tolist() == [[1, 0, 2, 0], [2, 0, 0, 1]]


# --- selection

CONFIDENCES = [0.2, 0.9, 0.5, 0.95, 0.7]


def test_static_takes_the_quotas_best():
    assert choose("low_confidence_static", CONFIDENCES, quota=3) == [1, 3, 4]


def test_sequential_takes_the_quotas_leftmost_masks():
    assert choose("sequential", CONFIDENCES, quota=2, masked=[False, True, False, True, True]) == [1, 3]


def test_dynamic_takes_all_above_the_threshold_if_they_reach_the_quota():
    assert choose("low_confidence_dynamic", CONFIDENCES, quota=1, threshold=0.6) == [1, 3, 4]
    assert choose("low_confidence_dynamic", CONFIDENCES, quota=3, threshold=0.6) == [1, 3, 4]


def test_dynamic_takes_the_quotas_best_otherwise():
    assert choose("low_confidence_dynamic", CONFIDENCES, quota=2, threshold=0.92) == [1, 3]
    assert choose("low_confidence_dynamic", CONFIDENCES, quota=1, threshold=1.0) == [3]


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "origin"])
def test_a_quota_of_0_transfers_nothing(strategy):
    assert choose(strategy, CONFIDENCES, quota=0, threshold=0.1, entropy_bound=100.0) == []


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "origin"])
def test_only_masks_are_transferred(strategy):
    masked = [True, False, True, False, False]
    chosen = choose(strategy, CONFIDENCES, quota=5, masked=masked, threshold=0.1, entropy_bound=100.0)
    assert chosen and set(chosen) <= {0, 2}


def test_ties_go_to_the_left():
    assert choose("low_confidence_static", [0.5, 0.7, 0.5, 0.5, 0.7], quota=3) == [0, 1, 4]


@pytest.mark.parametrize("strategy", ["low_confidence_static", "topk_margin", "entropy"])
def test_scores_that_rounding_sets_apart_tie(strategy):
    scores = [0.5 * (1 - 2**-22), 0.5, 0.5 * (1 + 2**-22)]
    assert choose(strategy, scores, quota=1) == [0]


@pytest.mark.parametrize(
    "scores",
    [[1 - 1.5e-6, 1 - 3e-6, 1.0], [2.001e-4, 2.0e-4, 2.002e-4], [1e-9, 0.0, 1.1e-9]],
    ids=["sure", "unsure", "tiny"],
)
def test_confidence_decides_and_not_position_wherever_it_differs_by_more(scores):
    """Of a model that is sure of all its tokens, and of one with many tokens that is sure of none."""
    assert choose("low_confidence_static", scores, quota=1) == [2]
    assert choose("low_confidence_static", scores, quota=2) == [0, 2]


def largest_prefix(confidences, factor):
    """Fast-dLLM's rule: sorted by confidence, the largest n with `c_n >= 1 - factor / (n + 1)`, at least 1."""
    ranked = sorted(confidences, reverse=True)
    passing = [n for n, c in enumerate(ranked, start=1) if c >= 1 - factor / (n + 1)]
    return max(passing, default=1)


def entropy_prefix(entropies, bound):
    """Ascending entropy while the running sum is below the bound, at least 1."""
    ranked = sorted(entropies)
    return max(sum(sum(ranked[:n]) < bound for n in range(1, len(ranked) + 1)), 1)


# Multiples of 1/64 are exact in float32: no rounding decides whether a sum reaches a bound.
exact = st.integers(1, 63).map(lambda n: n / 64)
several = st.lists(exact, min_size=1, max_size=8, unique=True)


@given(confidences=several, factor=exact.map(lambda f: 2 * f))
def test_factor_takes_the_most_that_its_thresholds_let_through(confidences, factor):
    ranked = sorted(confidences, reverse=True)[: largest_prefix(confidences, factor)]
    expected = [index for index, c in enumerate(confidences) if c in ranked]
    assert choose("factor", confidences, factor=factor) == expected


@given(entropies=several, bound=exact.map(lambda b: 3 * b))
def test_entropy_bounded_takes_ascending_entropy_below_the_bound(entropies, bound):
    ranked = sorted(entropies)[: entropy_prefix(entropies, bound)]
    expected = [index for index, e in enumerate(entropies) if e in ranked]
    assert choose("entropy_bounded", [-e for e in entropies], entropy_bound=bound) == expected


@pytest.mark.parametrize("quota", [1, 2, 4])
def test_alg_temp_draws_exactly_the_quota(quota):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gumbel = -torch.empty(1, 5).exponential_(generator=generator).log()
        assert len(choose("maskgit_plus", CONFIDENCES, quota=quota, gumbel=gumbel, alg_temp=0.5)) == quota


def test_alg_temp_draws_with_the_probabilities_of_the_softmax():
    draws, alg_temp = 40_000, 0.4
    gumbel = -torch.empty(draws, 5).exponential_(generator=torch.Generator().manual_seed(0)).log()
    confidence = torch.tensor([CONFIDENCES]).expand(draws, -1)
    masked = torch.tensor([[True, True, False, True, True]]).expand(draws, -1)
    rules = {"threshold": 0.9, "entropy_bound": 0.1, "factor": 1.0}
    one_each = torch.ones(draws, dtype=torch.long)

    chosen = select(STRATEGIES["maskgit_plus"], confidence, masked, one_each, **rules, gumbel=gumbel, alg_temp=alg_temp)

    logits = torch.tensor(CONFIDENCES) / alg_temp
    logits[2] = -torch.inf
    torch.testing.assert_close(chosen.float().mean(0), logits.softmax(-1), atol=0.01, rtol=0)


def test_a_row_is_chosen_from_as_if_it_were_alone():
    confidence = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    masked = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    quota = torch.tensor([1, 0, 3, 2])
    rules = {"threshold": 0.5, "entropy_bound": 1.0, "factor": 0.8}
    for strategy in STRATEGIES.values():
        if strategy.selection != "bernoulli":
            together = select(strategy, confidence, masked, quota, **rules)
            alone = [
                select(strategy, confidence[i : i + 1], masked[i : i + 1], quota[i : i + 1], **rules) for i in range(4)
            ]
            assert together.tolist() == torch.cat(alone).tolist()
