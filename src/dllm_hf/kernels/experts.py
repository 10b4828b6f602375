"""A mixture of experts: the router's choice, and the products of tokens with the experts that it chose.

Each token is multiplied by a few of many experts, of which a step reads the chosen ones once: the pairs of token and expert
are put into a table by expert, and a program computes some columns of the output of one tile of a table's row. (As in
MegaBlocks, arXiv:2211.15841, without sorting.)
"""

import torch

from .triton import tl, triton

MOST_ROWS = 64  # of a tile


def choose_experts_torch(
    logits, number, normalises, bias=None, groups=1, chosen_groups=1, scale=1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of [`choose_experts`]."""
    logits = logits.float()
    scores = logits.softmax(-1) if bias is None else logits.sigmoid()
    ranks = scores
    if bias is not None:
        ranks = (scores + bias).unflatten(-1, (groups, -1))
        best = ranks.topk(2, dim=-1)[0].sum(-1).topk(chosen_groups, dim=-1)[1]
        others = torch.ones(ranks.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, best, False)
        ranks = ranks.masked_fill(others[..., None], -torch.inf).flatten(1)
    chosen = ranks.topk(number, dim=-1)[1]
    weights = scores.gather(1, chosen)
    if normalises:
        weights = weights / (weights.sum(-1, keepdim=True) + (0.0 if bias is None else 1e-20))
    return weights * scale, chosen


def choose_experts(
    logits: torch.Tensor,
    number: int,
    normalises: bool,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    chosen_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token: those of the highest probability, as Qwen3-MoE; or, with a `bias`, of the highest sum of
    sigmoid and bias among the groups whose two best have the highest sum, as DeepSeek-V3 (arXiv:2412.19437) and GLM 4.

    Args:
        logits: `(tokens, experts)`, contiguous.
        number: of experts for a token.
        normalises: whether the weights are divided by their sum.
        bias: `(experts,)`.
        groups: into which the experts are divided evenly, a power of two in each of several.
        chosen_groups: for a token.
        scale: of the weights.

    Returns:
        Weights, `(tokens, number)` in float32, and the index of each expert, int64, in the order of their rank.
    """
    tokens, experts = logits.shape
    weights = torch.empty(tokens, number, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, number, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(experts)
    _choose[(tokens,)](
        logits, logits if bias is None else bias, weights, chosen, scale,
        EXPERTS=experts, NUMBER=number, GROUPS=groups, CHOSEN_GROUPS=chosen_groups,
        HAS_BIAS=bias is not None, NORMALISES=normalises,
        BLOCK=block, BLOCK_NUMBER=triton.next_power_of_2(number), num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return weights, chosen


def routed_experts_torch(x, chosen, weights, gate_up, down) -> torch.Tensor:
    """The twin of [`routed_experts`]: every pair with its expert's weights, so that nothing depends on what was chosen."""
    inputs, number = x[:, None].expand(-1, chosen.shape[1], -1), chosen.flatten()
    gate, up = torch.bmm(gate_up[number], inputs.flatten(0, 1)[..., None])[..., 0].chunk(2, dim=-1)
    outputs = torch.bmm(down[number], (torch.nn.functional.silu(gate) * up)[..., None])[..., 0]
    return (outputs.unflatten(0, chosen.shape) * weights[..., None]).float().sum(1).to(x.dtype)


def routed_experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of what the chosen experts, each a SwiGLU network, make of each token.

    Args:
        x: `(tokens, hidden)`, contiguous.
        chosen: `(tokens, number)` int64, contiguous: different experts for a token.
        weights: `(tokens, number)`, contiguous.
        gate_up: `(experts, 2 * inside, hidden)`, the last dimension contiguous: the rows of the gates first.
        down: `(experts, hidden, inside)`, the last dimension contiguous.

    Returns:
        `(tokens, hidden)`.
    """
    (tokens, hidden), number, (experts, _, inside) = x.shape, chosen.shape[1], down.shape
    pairs, device = tokens * number, x.device
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    table = torch.empty(experts, tokens, dtype=torch.int32, device=device)
    _assign[(triton.cdiv(pairs, 128),)](chosen, counts, table, pairs, tokens, BLOCK=128, num_warps=4)
    within = torch.empty(pairs, inside, dtype=x.dtype, device=device)
    outputs = torch.empty(pairs, hidden, dtype=x.dtype, device=device)
    block_m = max(16, min(MOST_ROWS, triton.next_power_of_2(pairs // experts)))
    tiles = min(pairs, experts + pairs // block_m)
    # Tiles of an H100. Float32, which serves comparisons, stays in registers.
    columns, inner, warps, stages = (128, 64, 4, 4) if block_m == MOST_ROWS else (64, 128, 2, 3)
    if x.dtype == torch.float32:
        columns, inner = 32, 32

    def product(source, weight, out, sharers: int, width: int, size: int, columns: int):
        block_n, block_k = (
            max(16, min(each, triton.next_power_of_2(n))) for each, n in ((columns, size), (inner, width))
        )
        _product[(triton.cdiv(size, block_n), tiles)](
            source, weight, counts, table, out, tokens, *weight.stride()[:2],
            EXPERTS=experts, SHARERS=sharers, WIDTH=width, SIZE=size, IS_GATED=weight is gate_up,
            BLOCK_E=triton.next_power_of_2(experts), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
        )  # fmt: skip

    product(x, gate_up, within, number, hidden, inside, columns // 2)
    product(within, down, outputs, 1, inside, hidden, columns)
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(hidden))
    _weighted_sum[(tokens, triton.cdiv(hidden, block))](
        outputs, weights, out, hidden, NUMBER=number, ROUNDS=weights.dtype == x.dtype, BLOCK=block, num_warps=4
    )
    return out


if triton is not None:

    @triton.jit
    def _choose(
        logits, bias, weights, chosen, scale,
        EXPERTS: tl.constexpr, NUMBER: tl.constexpr, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr,
        HAS_BIAS: tl.constexpr, NORMALISES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_NUMBER: tl.constexpr,
    ):  # fmt: skip
        """The experts of one token."""
        token = tl.program_id(0).to(tl.int64)
        experts, places = tl.arange(0, BLOCK), tl.arange(0, BLOCK_NUMBER)
        logit = tl.load(logits + token * EXPERTS + experts, mask=experts < EXPERTS, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            score = tl.sigmoid(logit)
            rank = score + tl.load(bias + experts, mask=experts < EXPERTS, other=-float("inf"))
            if GROUPS > 1:
                grouped = tl.reshape(rank, [GROUPS, BLOCK // GROUPS])
                best = tl.argmax(grouped, 1)
                rest = tl.where(tl.arange(0, BLOCK // GROUPS)[None, :] == best[:, None], -float("inf"), grouped)
                of_group = tl.max(grouped, 1) + tl.max(rest, 1)
                is_chosen = tl.zeros([GROUPS], tl.int32)
                for _ in tl.static_range(CHOSEN_GROUPS):
                    is_best = tl.arange(0, GROUPS) == tl.argmax(of_group, 0)
                    is_chosen = tl.where(is_best, 1, is_chosen)
                    of_group = tl.where(is_best, -float("inf"), of_group)
                rank = tl.reshape(tl.where(is_chosen[:, None] > 0, grouped, -float("inf")), [BLOCK])
        else:
            score = tl.exp(logit - tl.max(logit, 0))
            score = score / tl.sum(score, 0)
            rank = tl.where(experts < EXPERTS, score, -float("inf"))
        weight = tl.zeros([BLOCK_NUMBER], tl.float32)
        index = tl.zeros([BLOCK_NUMBER], tl.int32)
        for place in tl.static_range(NUMBER):
            expert = tl.argmax(rank, 0)
            weight = tl.where(places == place, tl.sum(tl.where(experts == expert, score, 0.0), 0), weight)
            index = tl.where(places == place, expert, index)
            rank = tl.where(experts == expert, -float("inf"), rank)
        if NORMALISES:
            weight = weight / (tl.sum(weight, 0) + (1e-20 if HAS_BIAS else 0.0))
        tl.store(weights + token * NUMBER + places, weight * scale, mask=places < NUMBER)
        tl.store(chosen + token * NUMBER + places, index.to(tl.int64), mask=places < NUMBER)

    @triton.jit(do_not_specialize=["pairs", "tokens"])
    def _assign(chosen, counts, table, pairs, tokens, BLOCK: tl.constexpr):
        """Puts pairs into the rows of their experts. In which order differs from run to run, and makes no difference: a
        product has its rows by themselves."""
        pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        exists = pair < pairs
        expert = tl.load(chosen + pair, mask=exists, other=0)
        place = tl.atomic_add(counts + expert, 1, mask=exists, sem="relaxed")
        tl.store(table + expert * tokens + place, pair, mask=exists)

    @triton.jit(do_not_specialize=["tokens"])
    def _product(
        source, weights, counts, table, out, tokens, weight_expert, weight_row,
        EXPERTS: tl.constexpr, SHARERS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, IS_GATED: tl.constexpr,
        BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Some columns of the output of one expert for some of its pairs; `SHARERS` pairs share a row of the source."""
        experts, tile = tl.arange(0, BLOCK_E), tl.program_id(1)
        number = tl.load(counts + experts, mask=experts < EXPERTS, other=0)
        end = tl.cumsum(tl.cdiv(number, BLOCK_M), 0)
        expert = tl.sum((end <= tile).to(tl.int32), 0)
        if expert >= EXPERTS:  # fewer tiles are needed than there could be
            return
        first = tl.sum(tl.where(experts == expert - 1, end, 0), 0)
        row = (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = row < tl.sum(tl.where(experts == expert, number, 0), 0)
        pair = tl.load(table + expert.to(tl.int64) * tokens + row, mask=exists, other=0)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        of_column = tl.minimum(column, SIZE - 1)[None, :] * weight_row
        weights += expert.to(tl.int64) * weight_expert
        sources = source + (pair // SHARERS).to(tl.int64)[:, None] * WIDTH
        result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if IS_GATED:
            up_result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, WIDTH, BLOCK_K):
            inner = begin + tl.arange(0, BLOCK_K)
            if WIDTH % BLOCK_K == 0:
                x = tl.load(sources + inner[None, :], mask=exists[:, None], other=0.0)
                weight = tl.load(weights + of_column + inner[:, None])
                if IS_GATED:
                    up = tl.load(weights + SIZE * weight_row + of_column + inner[:, None])
            else:
                inside = inner < WIDTH
                x = tl.load(sources + inner[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
                weight = tl.load(weights + of_column + inner[:, None], mask=inside[:, None], other=0.0)
                if IS_GATED:
                    up = tl.load(
                        weights + SIZE * weight_row + of_column + inner[:, None], mask=inside[:, None], other=0.0
                    )
            result += tl.dot(x, weight, input_precision=PRECISION)
            if IS_GATED:
                up_result += tl.dot(x, up, input_precision=PRECISION)
        kind: tl.constexpr = out.dtype.element_ty
        if IS_GATED:  # rounded where the library rounds
            gate = result.to(kind).to(tl.float32)
            result = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up_result.to(kind).to(tl.float32)
        place = pair.to(tl.int64)[:, None] * SIZE + column[None, :]
        tl.store(out + place, result.to(kind), mask=exists[:, None] & (column < SIZE)[None, :])

    @triton.jit(do_not_specialize=["size"])
    def _weighted_sum(outputs, weights, out, size, NUMBER: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        """A token's outputs, summed; with `ROUNDS`, each rounded after its weight."""
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        total = tl.zeros([BLOCK], tl.float32)
        for place in tl.static_range(NUMBER):
            weight = tl.load(weights + token * NUMBER + place).to(tl.float32)
            part = tl.load(outputs + (token * NUMBER + place) * size + column, mask=inside, other=0.0).to(tl.float32)
            part = part * weight
            if ROUNDS:
                part = part.to(out.dtype.element_ty).to(tl.float32)
            total += part
        tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)
