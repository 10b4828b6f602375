"""Quotas and selection rules, against their definitions written out for one row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf.generation.remasking import RULES, STRATEGIES, bernoulli_plan, select, transfer_quotas

EPS = 1e-3


def quotas(masks, steps, strategy="low_confidence_static"):
    return list(transfer_quotas(masks, steps, STRATEGIES[strategy], EPS))


def transferred(
    names, confidence, masked, quota, threshold=0.9, entropy_bound=0.1, factor=1.0, alg_temp=0.0, gumbel=None
):
    """What a step transfers in rows that each have the strategy of a name, and numbers of their own or in common."""
    strategies, rows = [STRATEGIES[name] for name in names], len(names)
    column = lambda value: torch.as_tensor(value).expand(rows)[:, None]
    return select(
        frozenset(strategy.selection for strategy in strategies),
        torch.tensor([[RULES.index(strategy.selection)] for strategy in strategies]),
        confidence,
        torch.tensor([[strategy.confidence == "probability"] for strategy in strategies]),
        masked,
        *map(column, (quota, threshold, entropy_bound, factor, alg_temp)),
        gumbel=gumbel,
    )


def choose(strategy, confidence, quota=1, masked=None, threshold=0.9, entropy_bound=0.1, factor=1.0, **noise):
    """The positions that a step transfers in one row."""
    confidence = torch.tensor([confidence], dtype=torch.float32)
    masked = torch.ones_like(confidence, dtype=torch.bool) if masked is None else torch.tensor([masked])
    rules = {"threshold": threshold, "entropy_bound": entropy_bound, "factor": factor}
    chosen = transferred([strategy], confidence, masked, quota, **rules, **noise)
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


def test_a_bernoulli_plan_has_the_probabilities_of_deciding_step_by_step():
    steps, positions = 6, 200_000
    plan = bernoulli_plan(torch.rand(positions, generator=torch.Generator().manual_seed(0)), steps, EPS)
    timesteps = torch.linspace(1, EPS, steps + 1)
    still_masked = torch.ones_like(plan, dtype=torch.bool)
    for step in range(steps):
        share = (plan[still_masked] == step).float().mean().item()
        probability = 1.0 if step == steps - 1 else 1 - (timesteps[step + 1] / timesteps[step]).item()
        deviation = math.sqrt(max(probability * (1 - probability), 1e-9) / still_masked.sum().item())
        assert abs(share - probability) < 5 * deviation
        still_masked &= plan > step
    assert not still_masked.any()


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
    chosen = transferred(draws * ["maskgit_plus"], confidence, masked, 1, alg_temp=alg_temp, gumbel=gumbel)

    logits = torch.tensor(CONFIDENCES) / alg_temp
    logits[2] = -torch.inf
    torch.testing.assert_close(chosen.float().mean(0), logits.softmax(-1), atol=0.01, rtol=0)


def test_rows_of_all_strategies_are_chosen_from_as_if_each_were_alone():
    """Each with thresholds, bounds, factors, quotas and temperatures of its own, in one step."""
    dice = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(*shape, generator=dice)
    names = 2 * list(STRATEGIES)
    rows = len(names)
    for width in (1, 5, 16, 33):
        confidence = (uniform(rows, width) * 8).round() / 8 if width % 2 else uniform(rows, width)
        is_entropy = torch.tensor([STRATEGIES[name].confidence == "neg_entropy" for name in names])[:, None]
        confidence = torch.where(is_entropy, -3 * confidence, confidence)
        masked, quota = uniform(rows, width) < 0.7, torch.randint(0, 6, (rows,), generator=dice)
        numbers = {"threshold": uniform(rows), "entropy_bound": 4 * uniform(rows), "factor": 2 * uniform(rows)}
        numbers["alg_temp"] = torch.tensor([0.0] * (rows // 2) + [0.3] * (rows - rows // 2))
        gumbel = -torch.empty(rows, width).exponential_(generator=dice).log()
        together = transferred(names, confidence, masked, quota, **numbers, gumbel=gumbel)
        for row, name in enumerate(names):
            own = {key: value[row] for key, value in numbers.items()}
            noise = gumbel[row : row + 1] if own["alg_temp"] else None
            alone = transferred(
                [name], confidence[row : row + 1], masked[row : row + 1], quota[row], **own, gumbel=noise
            )
            assert together[row].tolist() == alone[0].tolist(), (name, width)
