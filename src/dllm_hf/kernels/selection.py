"""Which masks a step transfers, as one kernel: in torch it is some fifty small ones after each pass, two sorts among them."""

import torch

from .triton import tl, triton

# Positions of a row up to which each is compared with each: more do not fit into a program's registers.
LARGEST_BLOCK = 64


def select_positions(
    rules: tuple[str, ...],
    tolerances: tuple[float, float],
    rule: torch.Tensor,
    scores: torch.Tensor,
    ranked_by: torch.Tensor,
    is_probability: torch.Tensor,
    masked: torch.Tensor,
    quota: torch.Tensor,
    threshold: torch.Tensor,
    entropy_bound: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """Which positions to transfer. Its twin is [`remasking.select`], which says what the arguments are. Besides:

    Args:
        rules: all there are; `rule` holds indices of them.
        tolerances: absolute and relative, see [`remasking.rank_of`].
        ranked_by: as `scores`, what the rules rank positions by.
    """
    rows, size = masked.shape
    chosen = torch.empty(rows, size, dtype=torch.uint8, device=masked.device)
    columns = rule, is_probability.view(torch.uint8), quota, threshold, entropy_bound, factor
    _select[(rows,)](
        scores.contiguous(), ranked_by.contiguous(), masked.contiguous().view(torch.uint8), chosen, *columns, size,
        *(each.stride(0) for each in columns), *tolerances,
        **{name.upper(): index for index, name in enumerate(rules) if name != "quota"},
        BLOCK=triton.next_power_of_2(size), num_warps=1 if size <= 8 else 4,
    )  # fmt: skip
    return chosen.view(torch.bool)


if triton is not None:
    # Columns of the canvas' tables begin anywhere and have any distance: that must not compile it again.
    PLACES = ["rule", "is_probability", "quota", "threshold", "entropy_bound", "factor", "size", "rule_row"]
    PLACES += ["probability_row", "quota_row", "threshold_row", "entropy_row", "factor_row"]

    @triton.jit(do_not_specialize=PLACES)
    def _select(
        scores, ranked_by, masked, chosen, rule, is_probability, quota, threshold, entropy_bound, factor, size,
        rule_row, probability_row, quota_row, threshold_row, entropy_row, factor_row, absolute, relative,
        THRESHOLD: tl.constexpr, FACTOR: tl.constexpr, ENTROPY_BOUND: tl.constexpr, SEQUENTIAL: tl.constexpr,
        BERNOULLI: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A row. Each position, `[:, None]`, is compared with each, `[None, :]`."""
        row, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        at, inside = row * size + index, index < size
        is_masked = tl.load(masked + at, mask=inside, other=0) != 0
        score = tl.where(is_masked, tl.load(scores + at, mask=inside, other=0.0), -float("inf"))
        ranked = tl.where(is_masked, tl.load(ranked_by + at, mask=inside, other=0.0), -float("inf"))
        own_rule, wanted = tl.load(rule + row * rule_row), tl.load(quota + row * quota_row)
        # Between a score and the next lower one is a drop, unless rounding may have set them apart. Positions with as many
        # drops above them tie, and the leftmost goes first.
        lower = tl.max(tl.where(ranked[None, :] < ranked[:, None], ranked[None, :], -float("inf")), 1)
        magnitude = tl.abs(ranked)
        tolerance = (absolute * (1.0 + magnitude)).to(tl.float32)
        of_probability = tl.minimum(tolerance, (relative * magnitude).to(tl.float32))
        tolerance = tl.where(tl.load(is_probability + row * probability_row) != 0, of_probability, tolerance)
        is_drop = ranked - lower > tolerance
        above = tl.sum(((ranked[None, :] > ranked[:, None]) & is_drop[None, :]).to(tl.int32), 1)
        is_left = index[None, :] < index[:, None]
        goes_before = (above[None, :] < above[:, None]) | ((above[None, :] == above[:, None]) & is_left)
        rank = tl.sum(goes_before.to(tl.int32), 1)
        bound = 1.0 - tl.div_rn(tl.load(factor + row * factor_row), (rank + 2).to(tl.float32))
        by_factor = tl.maximum(tl.sum((score >= bound).to(tl.int32), 0), 1)
        entropies = tl.sum(tl.where(rank[None, :] <= rank[:, None], -score[None, :], 0.0), 1)
        is_bounded = entropies < tl.load(entropy_bound + row * entropy_row)
        by_entropy = tl.maximum(tl.sum(is_bounded.to(tl.int32), 0), 1)
        count = tl.where(own_rule == FACTOR, by_factor, wanted.to(tl.int32))
        count = tl.where(own_rule == ENTROPY_BOUND, by_entropy, count)
        transfers = is_masked & (rank < count)
        is_above = is_masked & (score > tl.load(threshold + row * threshold_row))
        is_enough = (own_rule == THRESHOLD) & (tl.sum(is_above.to(tl.int32), 0) >= wanted)
        transfers = tl.where(is_enough, is_above, transfers)
        masks_before = tl.sum((is_masked[None, :] & is_left).to(tl.int32), 1)
        transfers = tl.where(own_rule == SEQUENTIAL, is_masked & (masks_before < wanted), transfers)
        transfers = tl.where(own_rule == BERNOULLI, is_masked, transfers) & (wanted > 0)
        tl.store(chosen + at, transfers.to(tl.uint8), mask=inside)
