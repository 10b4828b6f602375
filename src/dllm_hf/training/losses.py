"""Losses of masked-diffusion language models."""

import torch
from torch.nn import functional as F


def masked_diffusion_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logits_shift: int = 0,
    mask_ratio: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy at the masked positions, a float32 scalar.

    Without `mask_ratio`, the mean over the labelled positions. With it, LLaDA's bound on the negative log-likelihood
    per token (arXiv:2502.09992, equation 3): the loss of a position is divided by its ratio, and the sum by the number
    of tokens that could have been masked.

    Args:
        logits: `(batch, length, vocab)`, as the model returns them.
        labels: `(batch, length)`, the clean token at masked positions, -100 elsewhere.
        logits_shift: the logits of position i are at i - `logits_shift`.
        mask_ratio: `(batch,)` or `(batch, length)`, the probability with which a position was masked; 0 where it could
            not be, as in a prompt. Infinite at labels that only count as tokens in `num_items_in_batch`.
        token_mask: `(batch, length)`, 0 on padding, which is not counted as tokens.
        num_items_in_batch: what `transformers.Trainer` divides the sum by instead.
        position_ids: `(batch, length)`; several samples packed into a row each start from 0.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`labels` must be `(batch, length)` = {tuple(logits.shape[:2])}, but is {tuple(labels.shape)}: "
            "a loss needs the logits of every position (`logits_to_keep=0`)."
        )
    labels = labels.to(logits.device)
    if logits_shift:
        logits = logits.gather(1, previous_tokens(labels, position_ids, token_mask)[..., None].expand_as(logits))
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    losses = losses.view(labels.shape)
    labelled = labels != -100
    number: torch.Tensor | int = labelled.sum()
    if mask_ratio is not None:
        if mask_ratio.shape not in (labels.shape, labels.shape[:1]):
            raise ValueError(
                f"`mask_ratio` must be `(batch,)` or `(batch, length)` = {tuple(labels.shape)}, "
                f"but is {tuple(mask_ratio.shape)}."
            )
        ratio = mask_ratio.to(losses).view(labels.shape[0], -1)
        losses = losses / torch.where(labelled, ratio, 1.0)
        counted = (ratio > 0).expand_as(labels)
        number = (counted if token_mask is None else counted & token_mask.bool()).sum()
    if num_items_in_batch is not None:
        number = num_items_in_batch
    return losses.sum() / torch.as_tensor(number, device=losses.device).clamp(min=1)


def previous_tokens(
    tokens: torch.Tensor, position_ids: torch.Tensor | None = None, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The column of the token before each of `tokens`, `(batch, length)`, padding passed over; of the first token of a
    sample its own column, as in decoding. The other arguments are those of [`masked_diffusion_loss`]."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    real = index if token_mask is None else index.masked_fill(token_mask == 0, -1)
    before = F.pad(real.cummax(-1).values[:, :-1], (1, 0), value=-1)
    first = before < 0 if position_ids is None else (before < 0) | (position_ids == 0)
    return torch.where(first, index, before)
