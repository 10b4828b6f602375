"""Remasking: how many tokens a step must transfer, and which. A strategy is a score to rank by and a count to take.

Everything on tensors works row by row, on fixed shapes, so that a step can be captured in a graph, rows with different
strategies share a step, and a row never depends on its neighbours.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..kernels.selection import LARGEST_BLOCK, select_positions
from ..kernels.triton import has_kernels

# Scores closer than `ABSOLUTE * (1 + |score|)` tie; of probabilities, whose rounding is relative, also no closer than
# `RELATIVE * score`. The smallest values under which rows did not depend on their neighbours, on CPUs and on an H100:
# benchmarks/tie_tolerance.py.
ABSOLUTE, RELATIVE = 5e-7, 4e-6

# The canvas holds the index of a row's score and of its rule.
SCORES = (None, "probability", "margin", "neg_entropy", "random")
RULES = ("quota", "threshold", "factor", "entropy_bound", "sequential", "bernoulli")


@dataclass(frozen=True)
class Strategy:
    """`confidence`: the score of a proposal, or None where the selection reads none. `selection`: the rule that picks
    the positions to transfer. `schedule`: where the quotas come from."""

    confidence: str | None
    selection: str
    schedule: str = "uniform"

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of transferred tokens depends on the logits, so that a block may finish early."""
        return self.selection in ("threshold", "factor", "entropy_bound")


STRATEGIES = {
    # LLaDA, https://github.com/ML-GSAI/LLaDA (generate.py), and SDAR, https://github.com/JetAstra/SDAR (generate.py)
    "low_confidence": Strategy("probability", "quota"),
    "low_confidence_static": Strategy("probability", "quota"),
    "low_confidence_dynamic": Strategy("probability", "threshold"),
    "sequential": Strategy(None, "sequential"),
    "entropy_bounded": Strategy("neg_entropy", "entropy_bound"),
    "random": Strategy("random", "quota"),
    # Fast-dLLM, arXiv:2505.22618
    "factor": Strategy("probability", "factor"),
    # Dream, https://github.com/DreamLM/Dream (generation_utils.py)
    "origin": Strategy(None, "bernoulli", "timestep"),
    "maskgit_plus": Strategy("probability", "quota", "timestep"),
    "topk_margin": Strategy("margin", "quota", "timestep"),
    "entropy": Strategy("neg_entropy", "quota", "timestep"),
}


@lru_cache(1024)
def transfer_quotas(
    masks: int, steps: int | None, strategy: Strategy, eps: float, whole: int | None = None
) -> tuple[int, ...]:
    """How many tokens each step of a block must transfer. Known already of most blocks: they are like the one before.

    Args:
        masks: the masked positions in the block.
        steps: the denoising steps of the block; `None` transfers one token a step.
        strategy: `schedule` is `uniform` (LLaDA, SDAR: the masks divided by the steps, the remainder on the first
            steps) or `timestep` (Dream: `int(masks left * (1 - t[i+1] / t[i]))`, the rest on the last step).
        eps: the last timestep.
        whole: what a uniform schedule divides in the place of the masks, for as long as masks are left (LLaDA2: the block's
            length).
    """
    if steps is None or strategy.selection in ("factor", "entropy_bound"):
        return (1,) * masks
    if strategy.schedule == "uniform":
        whole, quotas = masks if whole is None else whole, list[int]()
        while masks > 0:
            step = len(quotas)
            quotas.append(min(whole // steps + (step < whole % steps), masks))
            masks -= quotas[-1]
        return tuple(quotas)
    timesteps, quotas, left = _timesteps(steps, eps), [], masks
    for ratio in (1 - timesteps[1:] / timesteps[:-1])[:-1]:
        quotas.append(int(torch.tensor(left, dtype=torch.float32) * ratio))
        left -= quotas[-1]
    return (*quotas, left) if masks else ()


def bernoulli_plan(noise: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """The step at which Dream's `origin` transfers each position.

    Its rule, transfer each masked position with probability `1 - t[i+1] / t[i]` at step i, leaves a position masked
    after step i with probability `t[i+1]`. One uniform number per position therefore decides the step, and it is known
    before the block starts which steps transfer nothing and need no forward pass.

    Args:
        noise: `(block,)`, uniform in [0, 1).
        steps: the denoising steps of the block.
        eps: the last timestep.

    Returns:
        `(block,)`, the step of each position, from 0 to `steps` - 1.
    """
    survival = torch.zeros(steps)
    survival[: steps - 1] = _timesteps(steps, eps)[1:-1]
    # How many of the falling survival probabilities are above the number drawn.
    return steps - torch.searchsorted(survival.to(noise).flip(-1), noise, right=True)


def _timesteps(steps: int, eps: float) -> torch.Tensor:
    return torch.linspace(1, eps, steps + 1, dtype=torch.float32)


def select(
    rules: frozenset[str],
    rule: torch.Tensor,
    scores: torch.Tensor,
    is_probability: torch.Tensor,
    masked: torch.Tensor,
    quota: torch.Tensor,
    threshold: torch.Tensor,
    entropy_bound: torch.Tensor,
    factor: torch.Tensor,
    alg_temp: torch.Tensor | None = None,
    gumbel: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which masked positions to transfer. Of positions with equal scores the leftmost goes first.

    Args:
        rules: the rules of all rows.
        rule: `(rows, 1)`, the index in `RULES` of each row's rule.
        scores: `(rows, block)` float32, as [`sampling.propose`] returns them.
        is_probability: `(rows, 1)` bool, whether a row's scores are probabilities.
        masked: `(rows, block)` bool, the positions that may be transferred.
        quota: `(rows, 1)`, how many the step must transfer. A row whose quota is 0 transfers nothing.
        threshold, entropy_bound, factor: `(rows, 1)`, read by the rules of those names.
        alg_temp, gumbel: `(rows, 1)` and `(rows, block)` standard Gumbel noise, both or none. Where the temperature is above
            0, rules with a quota draw it from `softmax(scores / alg_temp)` without replacement (the Gumbel-top-k trick,
            arXiv:1903.06059) instead of taking the best.

    Returns:
        `(rows, block)` bool.
    """
    quota = quota.expand(len(masked), 1)
    if rules <= {"bernoulli"}:
        return masked & (quota > 0)
    if rules <= {"sequential"}:
        return leftmost_of(masked, quota)
    has = lambda name: rule == RULES.index(name)
    ranked_by = scores
    if gumbel is not None and alg_temp is not None:
        drawn = (scores / alg_temp.clamp(min=1e-30)).clamp(min=torch.finfo(torch.float32).min / 2) + gumbel
        draws = (alg_temp > 0) & (has("quota") | has("threshold"))
        ranked_by, is_probability = torch.where(draws, drawn, scores), is_probability & ~draws
    if has_kernels(scores) and scores.shape[1] <= LARGEST_BLOCK:
        numbers = (quota, threshold, entropy_bound, factor)
        tolerances = (ABSOLUTE, RELATIVE)
        return select_positions(RULES, tolerances, rule, scores, ranked_by, is_probability, masked, *numbers)
    order, rank = rank_of(torch.where(masked, ranked_by, -torch.inf), is_probability)
    count = quota
    number = torch.arange(1, order.shape[1] + 1, device=order.device)
    falling = lambda: torch.where(masked, scores, -torch.inf).gather(-1, order)
    if "factor" in rules:
        # The thresholds rise as the sorted confidences fall: the positions that pass are a prefix.
        passing = (falling() >= 1 - factor / (number + 1)).sum(-1, keepdim=True)
        count = torch.where(has("factor"), passing.clamp(min=1), count)
    if "entropy_bound" in rules:
        # The score is the negative entropy: ascending entropy is falling score.
        passing = ((-falling()).cumsum(-1) < entropy_bound).sum(-1, keepdim=True)
        count = torch.where(has("entropy_bound"), passing.clamp(min=1), count)
    chosen = masked & (rank < count)
    if "threshold" in rules:
        above = masked & (scores > threshold)
        is_enough = has("threshold") & (above.sum(-1, keepdim=True) >= quota)
        chosen = torch.where(is_enough, above, chosen)
    if "sequential" in rules:
        chosen = torch.where(has("sequential"), leftmost_of(masked, quota), chosen)
    if "bernoulli" in rules:
        chosen = torch.where(has("bernoulli"), masked, chosen)
    return chosen & (quota > 0)


def leftmost_of(masked: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The first `quota` positions of `masked`, `(rows, block)`."""
    return masked & (masked.cumsum(-1) <= quota)


def rank_of(scores: torch.Tensor, is_probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order positions by falling score, `(rows, block)` both ways: the position at each rank, the rank of each position.

    Scores that differ by no more than rounding count as equal, and the leftmost goes first. Exact ties are common, since
    on a canvas of masks alone every position sees the same; which of them came out ahead would depend on the shape of
    the batch.

    Args:
        is_probability: `(rows, 1)` bool, the rows whose scores are probabilities.
    """
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    falling = scores.gather(-1, by_score)
    size = falling[:, :-1].abs()
    tolerance = ABSOLUTE * (1 + size)
    tolerance = torch.where(is_probability, torch.minimum(tolerance, RELATIVE * size), tolerance)
    drops = falling[:, :-1] - falling[:, 1:] > tolerance
    group = torch.nn.functional.pad(drops.long().cumsum(-1), (1, 0))
    order = torch.empty_like(by_score).scatter_(-1, by_score, group).argsort(dim=-1, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(-1, order, ranks)
