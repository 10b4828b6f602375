"""Noise for masked-diffusion training: which tokens of a clean text become masks."""

import torch

# The lowest probability with which a token is masked, as in LLaDA.
EPS = 1e-3


def mask_sequences(
    tokens: torch.Tensor, maskable: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One rate for each sequence, drawn from (0, 1) (LLaDA, arXiv:2502.09992; Dream, arXiv:2508.15487).

    Args:
        tokens: `(batch, length)`.
        maskable: `(batch, length)` bool; prompt and padding are False.

    Returns:
        The noisy tokens, the labels (the clean token at masked positions, -100 elsewhere) and the rates, `(batch,)`.
    """
    rate = EPS + (1 - EPS) * torch.rand(len(tokens), device=tokens.device)
    masked = maskable & (torch.rand(tokens.shape, device=tokens.device) < rate[:, None])
    return *_apply(tokens, masked, mask_token_id), rate


def mask_complementary(
    tokens: torch.Tensor, maskable: torch.Tensor, mask_token_id: int, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One rate for each block, and every sequence twice, the second time with the inverted mask, so that each token is
    learnt once (Fast-dLLM v2, arXiv:2509.26328).

    Args:
        blocks: `(batch, length)`, the number of the block that a token stands in.

    Returns:
        The noisy tokens and the labels, `(2 * batch, length)`: first the masks, then the inverted ones.
    """
    rates = EPS + (1 - EPS) * torch.rand(len(tokens), tokens.shape[1], device=tokens.device)
    # Blocks follow each other, so that no two of a row share a rate; the first need not be number 0.
    rates = rates.gather(1, blocks.expand_as(tokens) % tokens.shape[1])
    drawn = torch.rand(tokens.shape, device=tokens.device) < rates
    masked = torch.cat([drawn, ~drawn]) & maskable.repeat(2, 1)
    return _apply(tokens.repeat(2, 1), masked, mask_token_id)


def _apply(tokens: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(masked, mask_token_id, tokens), torch.where(masked, tokens, -100)
