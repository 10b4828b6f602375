"""Noise for masked-diffusion training: which tokens of a clean text become masks."""

import torch

# The lowest probability with which a token is masked, as in LLaDA.
EPS = 1e-3


def draw_rates(number: int, device: torch.device | str, generator: torch.Generator | None = None) -> torch.Tensor:
    """`(number,)` masking rates, each uniform on (EPS, 1), one from each of `number` equal slices in random order, so
    that every batch has low and high ones (Sahoo et al., arXiv:2406.07524, section C.3)."""
    order = torch.randperm(number, generator=generator, device=device)
    return EPS + (1 - EPS) * (order + torch.rand(number, generator=generator, device=device)) / max(number, 1)


def mask_sequences(
    tokens: torch.Tensor,
    maskable: torch.Tensor,
    mask_token_id: int,
    samples: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask each sequence at one rate (LLaDA, arXiv:2502.09992; Dream, arXiv:2508.15487).

    Args:
        tokens: `(batch, length)`.
        maskable: `(batch, length)` bool; prompt and padding are False.
        samples: `(batch, length)`, which of the samples packed into a row a token belongs to: each has its own rate.
        generator: on the device of `tokens`.

    Returns:
        The noisy tokens, the labels (the clean token at masked positions, -100 elsewhere) and the rates, `(batch,)`, or
        `(batch, length)` for packed samples.
    """
    if samples is None:
        rates = draw_rates(len(tokens), tokens.device, generator)
        each = rates[:, None]
    else:
        counts = samples[:, -1] + 1
        rates = draw_rates(int(counts.sum()), tokens.device, generator)
        rates = each = rates[samples + (counts.cumsum(0) - counts)[:, None]]
    masked = maskable & (torch.rand(tokens.shape, generator=generator, device=tokens.device) < each)
    return *_apply(tokens, masked, mask_token_id), rates


def mask_complementary(
    tokens: torch.Tensor,
    maskable: torch.Tensor,
    mask_token_id: int,
    blocks: torch.Tensor,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask each block at one rate, and every sequence a second time with the inverted mask, so that each token is learnt
    once (Fast-dLLM v2, arXiv:2509.26328).

    Args:
        blocks: `(batch, length)`, the number of a token's block.

    Returns:
        The noisy tokens and the labels, `(2 * batch, length)`: first the masks, then the inverted ones.
    """
    rates = EPS + (1 - EPS) * torch.rand(tokens.shape, generator=generator, device=tokens.device)
    # Modulo: the numbers of a row are consecutive, but need not begin at 0.
    rates = rates.gather(1, blocks.expand_as(tokens) % tokens.shape[1])
    drawn = torch.rand(tokens.shape, generator=generator, device=tokens.device) < rates
    masked = torch.cat([drawn, ~drawn]) & maskable.repeat(2, 1)
    return _apply(tokens.repeat(2, 1), masked, mask_token_id)


def context_weights(known: torch.Tensor, p: float, samples: torch.Tensor | None = None) -> torch.Tensor:
    """CART, the weights of Dream's context-adaptive noise rescheduling (arXiv:2508.15487, section 3.2), `(batch, length)`:
    known tokens m near a mask n raise its weight, `1/2 * sum over m of p * (1 - p)^(|n - m| - 1)`.

    Args:
        known: `(batch, length)` bool, False at masks and padding.
        p: of the geometric distribution; 0.1, 0.3 and 0.8 are common. The larger, the fewer neighbours count.
        samples: as in [`mask_sequences`].
    """
    index = torch.arange(known.shape[1], device=known.device)
    distance = (index[:, None] - index).abs()
    weights = torch.where(distance > 0, 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0).float(), 0.0)
    if samples is None:
        return known.float() @ weights
    same = samples[:, :, None] == samples[:, None]
    return ((known[:, None] & same) * weights).sum(-1)


def _apply(tokens: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(masked, mask_token_id, tokens), torch.where(masked, tokens, -100)
