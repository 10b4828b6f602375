"""The best token of each position and how sure it is, in one pass over the logits and without a copy of them."""

import torch

from .triton import tl, triton

BLOCK = 4096


def best_tokens_torch(
    logits: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of [`best_tokens`]."""
    log_probs = logits.float().log_softmax(-1)
    probs = log_probs.exp()
    entropy = torch.special.entr(probs).sum(-1)
    allowed = log_probs.clone()
    allowed[..., mask_token_id] = -torch.inf
    best = allowed.argmax(-1)
    probability = probs.gather(-1, best[..., None])
    second = probs.scatter(-1, best[..., None], 0.0).amax(-1)
    return best, probability.squeeze(-1), probability.squeeze(-1) - second, entropy


def best_tokens(
    logits: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Args:
        logits: `(..., vocab)`.
        mask_token_id: never the best; it counts in the distribution all the same.

    Returns:
        For each position the best token (the first of equals), its probability, the margin in probability to the second
        best, and the entropy of the distribution in nats. NaN where the logits are.
    """
    best, probability, margin, entropy, _ = merge(scan(logits, mask_token_id), mask_token_id, logits.shape[:-1])
    return best, probability, margin, entropy


def scan_torch(
    logits: torch.Tensor, mask_token_id: int, first_token: int = 0, chunks: int | None = None
) -> torch.Tensor:
    """The twin of [`scan`]."""
    vocab = logits.shape[-1]
    chunks = chunks or -(-vocab // BLOCK)
    padded = torch.nn.functional.pad(logits.float(), (0, chunks * BLOCK - vocab), value=-torch.inf)
    parts = padded.view(-1, chunks, BLOCK)
    without_nan = parts.masked_fill(parts.isnan(), -torch.inf)
    base = without_nan.amax(-1)
    base = base.masked_fill(base == -torch.inf, 0)
    distance = parts - base[..., None]
    weight = distance.exp()
    spread = torch.where(weight > 0, weight * distance, 0.0).sum(-1)
    token = torch.arange(chunks * BLOCK, device=logits.device).view(chunks, BLOCK)
    best, winner = without_nan.masked_fill(token == mask_token_id, -torch.inf).max(-1)
    second = without_nan.scatter(-1, winner[..., None].where(best[..., None] > -torch.inf, 0), -torch.inf)
    second = torch.where(best > -torch.inf, second.amax(-1), without_nan.amax(-1))
    winner = winner + token[:, 0] + first_token
    winner = winner.masked_fill(best == -torch.inf, -1).int().view(torch.float32)
    return torch.stack([base, weight.sum(-1), spread, best, second, winner])


def scan(logits: torch.Tensor, mask_token_id: int, first_token: int = 0, chunks: int | None = None) -> torch.Tensor:
    """The first half of [`best_tokens`], for logits of a part of the vocabulary: what a process tells the others of it.

    Args:
        logits: `(..., part)`, of the tokens from `first_token` on.
        mask_token_id: the index of the mask in the part; -1 where it is in another one.
        chunks: as many as the largest part has.

    Returns:
        `(6, positions, chunks)` float32 for [`merge`]: of each chunk maximum, sum of exponentials, their sum weighted by the
        distance from the maximum, the two best logits, and the bits of the best token's id.
    """
    vocab, logits = logits.shape[-1], logits.contiguous()
    rows, chunks = logits.numel() // vocab, chunks or triton.cdiv(vocab, BLOCK)
    parts = torch.empty(6, rows, chunks, dtype=torch.float32, device=logits.device)
    tokens = parts[5].view(torch.int32)
    _scan[(rows, chunks)](
        logits, parts, tokens, vocab, mask_token_id, first_token, rows * chunks, BLOCK=BLOCK, num_warps=8
    )
    return parts


def merge_torch(parts: torch.Tensor, mask_token_id: int, shape: torch.Size) -> tuple[torch.Tensor, ...]:
    """The twin of [`merge`]."""
    base, total, spread, first, second, _ = parts
    tokens = parts[5].view(torch.int32)
    highest = torch.where(total != 0, base, -torch.inf).amax(-1, keepdim=True)
    weight = torch.where(total != 0, (base - highest).exp(), 0.0)
    sums = (total * weight).sum(-1)
    shifted = torch.where(total != 0, weight * (spread + total * (base - highest)), 0.0).sum(-1)
    logsum = highest.squeeze(-1) + sums.log()
    top, winner = first.max(-1, keepdim=True)
    runner = torch.where(
        torch.arange(first.shape[-1], device=parts.device) == winner, second, first.maximum(second)
    ).amax(-1)
    token = tokens.gather(-1, winner).squeeze(-1).clamp(min=int(mask_token_id == 0)).long()
    probability = (top.squeeze(-1) - logsum).exp()
    results = (token, probability, probability - (runner - logsum).exp(), sums.log() - shifted / sums, logsum)
    return tuple(each.view(shape) for each in results)


def merge(parts: torch.Tensor, mask_token_id: int, shape: torch.Size) -> tuple[torch.Tensor, ...]:
    """The second half of [`best_tokens`].

    Args:
        parts: as [`scan`] returns them, those of all parts of the vocabulary side by side, in its order.
        mask_token_id: in the whole vocabulary.
        shape: of the positions.

    Returns:
        As [`best_tokens`], and the logarithm of the sum of the exponentials of the logits.
    """
    parts = parts.contiguous()
    _, rows, chunks = parts.shape
    best = torch.empty(shape, dtype=torch.long, device=parts.device)
    probability, margin, entropy, logsum = torch.empty(4, *shape, dtype=torch.float32, device=parts.device)
    _merge[(rows,)](
        parts, parts[5].view(torch.int32), best, probability, margin, entropy, logsum, chunks, rows * chunks,
        int(mask_token_id == 0), BLOCK=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return best, probability, margin, entropy, logsum


if triton is not None:
    # Not specialised: another mask, or a number of positions that comes up for the first time, must not compile it again.
    @triton.jit(do_not_specialize=["tokens", "mask_token_id", "first_token", "number"])
    def _scan(logits, parts, tokens, vocab, mask_token_id, first_token, number, BLOCK: tl.constexpr):
        """A chunk of a row: its maximum, sum of exponentials, their sum weighted by the logits' distance from the
        maximum, and the two best."""
        row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * vocab + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        # A maximum must ignore NaN; the sums keep it, so that rows with NaN stay visible.
        without_nan = tl.where(logit == logit, logit, -float("inf"))
        highest = tl.max(without_nan, 0)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        distance = logit - base
        weight = tl.exp(distance)
        total = tl.sum(weight, 0)
        spread = tl.sum(tl.where(weight > 0, weight * distance, 0.0), 0)
        allowed = tl.where(token == mask_token_id, -float("inf"), without_nan)
        best = tl.max(allowed, 0)
        winner = chunk * BLOCK + tl.argmax(allowed, 0)
        winner = tl.where(best > -float("inf"), winner, -1)  # a chunk may hold the mask alone
        second = tl.max(tl.where(token == winner, -float("inf"), without_nan), 0)
        index = row * tl.num_programs(1) + chunk
        tl.store(parts + index, base)
        tl.store(parts + number + index, total)
        tl.store(parts + 2 * number + index, spread)
        tl.store(parts + 3 * number + index, best)
        tl.store(parts + 4 * number + index, second)
        tl.store(tokens + index, tl.where(winner >= 0, winner + first_token, -1))

    # Nor these: where the results of some positions begin depends on how many there are.
    @triton.jit(do_not_specialize=["tokens", "probability", "margin", "entropy", "log_sums", "number", "lowest"])
    def _merge(
        parts, tokens, best, probability, margin, entropy, log_sums, chunks, number, lowest, BLOCK: tl.constexpr
    ):
        """The chunks of a row. `lowest`: the first token id that is not the mask."""
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.arange(0, BLOCK)
        inside = chunk < chunks
        index = row * chunks + chunk
        base = tl.load(parts + index, mask=inside, other=-float("inf"))
        total = tl.load(parts + number + index, mask=inside, other=0.0)
        spread = tl.load(parts + 2 * number + index, mask=inside, other=0.0)
        first = tl.load(parts + 3 * number + index, mask=inside, other=-float("inf"))
        second = tl.load(parts + 4 * number + index, mask=inside, other=-float("inf"))
        highest = tl.max(tl.where(total != 0, base, -float("inf")), 0)
        weight = tl.where(total != 0, tl.exp(base - highest), 0.0)
        sums = tl.sum(total * weight, 0)
        # Sum of p * (x - highest), from distances to each chunk's own maximum.
        shifted = tl.sum(tl.where(total != 0, weight * (spread + total * (base - highest)), 0.0), 0)
        logsum = highest + tl.log(sums)
        winner = tl.argmax(first, 0)
        is_winner = chunk == winner
        top = tl.max(first, 0)
        runner = tl.max(tl.where(is_winner, second, tl.maximum(first, second)), 0)
        token = tl.sum(tl.where(is_winner, tl.load(tokens + index, mask=inside, other=0), 0), 0)
        # A row of NaN has no best token (-1): a valid id is stored, which is not the mask.
        token = tl.maximum(token, lowest)
        tl.store(best + row, token.to(tl.int64))
        tl.store(log_sums + row, logsum)
        tl.store(probability + row, tl.exp(top - logsum))
        tl.store(margin + row, tl.exp(top - logsum) - tl.exp(runner - logsum))
        tl.store(entropy + row, tl.log(sums) - shifted / sums)
