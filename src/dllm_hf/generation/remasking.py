"""Remasking: how sure a proposal is, how many a step must transfer, and which.

A strategy is a confidence score, a selection rule and a schedule of quotas. Everything here works on tensors of fixed
shape, row by row, so that a step can be captured in a graph and a row never depends on its neighbours.
"""

from dataclasses import dataclass

import torch

# Scores closer than `ABSOLUTE * (1 + |score|)` tie; of probabilities, whose rounding is relative, also no closer than
# `RELATIVE * score`. The smallest values under which rows did not depend on their neighbours, on CPUs and on an H100:
# benchmarks/tie_tolerance.py.
ABSOLUTE, RELATIVE = 2.5e-7, 1e-6


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


def transfer_quotas(masks: list[int], steps: list[int | None], strategy: Strategy, eps: float) -> torch.Tensor:
    """How many tokens each step of a block must transfer.

    Args:
        masks: the masked positions in each row's block.
        steps: the denoising steps of each row's block; `None` transfers one token a step.
        strategy: `schedule` is `uniform` (LLaDA, SDAR: the masks divided by the steps, the remainder on the first
            steps) or `timestep` (Dream: `int(masks left * (1 - t[i+1] / t[i]))`, the rest on the last step).
        eps: the last timestep.

    Returns:
        `(batch, steps)` on the CPU, as many columns as the slowest row needs.
    """
    rows = []
    for count, number in zip(masks, steps, strict=True):
        if number is None or strategy.selection in ("factor", "entropy_bound"):
            rows.append([1] * count)
        elif strategy.schedule == "uniform":
            rows.append([count // number + (i < count % number) for i in range(min(number, count))])
        else:
            quotas, left = [], count
            for ratio in _transfer_ratios(number, eps)[:-1]:
                quotas.append(int(torch.tensor(left, dtype=torch.float32) * ratio))
                left -= quotas[-1]
            rows.append([*quotas, left] if count else [])
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)


def bernoulli_quotas(plan: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """`(batch, steps)` on the CPU: how many masked positions the plan of [`bernoulli_plan`] transfers at each step."""
    last = int(torch.where(masked, plan, -1).max())
    steps = torch.arange(last + 1, device=plan.device)
    return ((plan[..., None] == steps) & masked[..., None]).sum(1).cpu()


def bernoulli_plan(noise: torch.Tensor, steps: list[int], eps: float) -> torch.Tensor:
    """The step at which Dream's `origin` transfers each position.

    Its rule, transfer each masked position with probability `1 - t[i+1] / t[i]` at step i, leaves a position masked
    after step i with probability `t[i+1]`. One uniform number per position therefore decides the step, and it is known
    before the block starts which steps transfer nothing and need no forward pass.

    Args:
        noise: `(batch, block)`, uniform in [0, 1).
        steps: the denoising steps of each row's block.
        eps: the last timestep.

    Returns:
        `(batch, block)`, the step of each position, from 0 to its row's steps - 1.
    """
    survival = torch.zeros(len(steps), max(steps))
    for row, number in enumerate(steps):
        survival[row, : number - 1] = _timesteps(number, eps)[1:-1]
    # How many of the falling survival probabilities are above the number drawn.
    rising = survival.to(noise).flip(-1)
    return max(steps) - torch.searchsorted(rising, noise, right=True)


def _timesteps(steps: int, eps: float) -> torch.Tensor:
    return torch.linspace(1, eps, steps + 1, dtype=torch.float32)


def _transfer_ratios(steps: int, eps: float) -> torch.Tensor:
    timesteps = _timesteps(steps, eps)
    return 1 - timesteps[1:] / timesteps[:-1]


def select(
    strategy: Strategy,
    confidence: torch.Tensor,
    masked: torch.Tensor,
    quota: torch.Tensor,
    *,
    threshold: float,
    entropy_bound: float,
    factor: float,
    gumbel: torch.Tensor | None = None,
    alg_temp: float = 0.0,
) -> torch.Tensor:
    """Which masked positions to transfer. Of positions equally sure, the leftmost go first.

    Args:
        confidence: `(batch, block)` float32, as [`sampling.confidence`] returns it.
        masked: `(batch, block)` bool, the positions that may be transferred.
        quota: `(batch,)`, how many the step must transfer. A row whose quota is 0 transfers nothing.
        threshold, entropy_bound, factor: read by the rules of those names.
        gumbel: `(batch, block)` standard Gumbel noise: the quota is then drawn from `softmax(confidence / alg_temp)`
            without replacement (the Gumbel-top-k trick, arXiv:1903.06059) instead of taken from the top.

    Returns:
        `(batch, block)` bool.
    """
    if strategy.selection == "sequential":
        return masked & (masked.cumsum(-1) <= quota[:, None])

    score = confidence
    if gumbel is not None and strategy.selection in ("quota", "threshold"):
        score = (confidence / alg_temp).clamp(min=torch.finfo(torch.float32).min / 2) + gumbel
    is_probability = strategy.confidence == "probability" and score is confidence
    order, rank = rank_of(torch.where(masked, score, -torch.inf), is_probability)
    best = masked & (rank < quota[:, None])
    if strategy.selection == "quota":
        return best
    if strategy.selection == "threshold":
        above = masked & (confidence > threshold)
        return torch.where((above.sum(-1) >= quota)[:, None], above, best) & (quota > 0)[:, None]

    number = torch.arange(1, order.shape[1] + 1, device=order.device)
    ranked = torch.where(masked, confidence, -torch.inf).gather(-1, order)
    if strategy.selection == "factor":
        # The thresholds rise as the sorted confidences fall: the positions that pass are a prefix.
        passes = ranked >= 1 - factor / (number + 1)
    else:
        # Confidence is the negative entropy: ascending entropy is descending confidence.
        passes = (-ranked).cumsum(-1) < entropy_bound
    count = (passes.sum(-1).clamp(min=1) * (quota > 0))[:, None]
    return masked & (rank < count)


def rank_of(scores: torch.Tensor, is_probability: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Order positions by falling score, `(batch, block)` both ways: the position at each rank, the rank of each position.

    Scores that differ by no more than rounding count as equal, and the leftmost goes first. Exact ties are common, since
    on a canvas of masks alone every position sees the same; which of them came out ahead would depend on the shape of
    the batch.
    """
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    falling = scores.gather(-1, by_score)
    tolerance = ABSOLUTE * (1 + falling[:, :-1].abs())
    if is_probability:
        tolerance = torch.minimum(tolerance, RELATIVE * falling[:, :-1].abs())
    drops = falling[:, :-1] - falling[:, 1:] > tolerance
    group = torch.nn.functional.pad(drops.long().cumsum(-1), (1, 0))
    order = torch.empty_like(by_score).scatter_(-1, by_score, group).argsort(dim=-1, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(-1, order, ranks)
