"""`VocabularyPart`: proposals and scores from logits of which each process has a part."""

import torch

from ..kernels.best_tokens import BLOCK, merge, merge_torch, scan, scan_torch
from ..kernels.triton import has_kernels
from .ranks import Ranks


class VocabularyPart:
    """The tokens whose logits this process computes. The processes tell each other what they know of each position, some
    numbers instead of the logits, and come to the same proposals.

    Args:
        vocab_size: of all processes together.

    Attributes:
        begin, end: the tokens of this process; the last parts may be shorter.
    """

    def __init__(self, ranks: Ranks, vocab_size: int):
        self.ranks, self.vocab_size = ranks, vocab_size
        self.size = -(-vocab_size // ranks.size)
        self.begin = min(ranks.rank * self.size, vocab_size)
        self.end = min(self.begin + self.size, vocab_size)

    def index(self, tokens: torch.Tensor) -> torch.Tensor:
        """The index of tokens in the part, -1 where they are in another one."""
        return torch.where((tokens >= self.begin) & (tokens < self.end), tokens - self.begin, -1)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """`(..., part)` of each process -> `(..., vocab_size)`."""
        padded = torch.nn.functional.pad(logits, (0, self.size - logits.shape[-1]))
        return self.ranks.all_gather(padded).movedim(0, -2).flatten(-2)[..., : self.vocab_size]

    def propose(
        self, logits: torch.Tensor, scored: torch.Tensor, mask_token_id: int, gumbel: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str | None, torch.Tensor]]:
        """As [`sampling.propose`].

        Args:
            logits: `(rows, block, part)`, from which tokens are proposed.
            scored: `(rows, block, part)`, from which the scores are read.
            gumbel: `(rows, block, vocab_size)`; as without one if it is None.
        """
        mask = mask_token_id - self.begin if self.begin <= mask_token_id < self.end else -1
        first, second = (scan, merge) if has_kernels(logits) else (scan_torch, merge_torch)
        parts = first(scored, mask, self.begin, -(-self.size // BLOCK))
        parts = self.ranks.all_gather(parts).movedim(0, 2).flatten(2, 3)  # (6, positions, chunks)
        proposals, probability, margin, entropy, logsum = second(parts, mask_token_id, logits.shape[:-1])
        if gumbel is not None:
            perturbed = logits.double() + gumbel[..., self.begin : self.end]
            if mask >= 0:
                perturbed[..., mask] = -torch.inf
            best, index = perturbed.max(-1)
            logit = scored.double().gather(-1, index[..., None]).squeeze(-1)
            # Token ids are exact in float64. Of equal ones the first wins, as in one process.
            every = self.ranks.all_gather(torch.stack([best, (index + self.begin).double(), logit]))
            winner = every[:, 0].argmax(0)[None, None].expand(1, 3, *best.shape)
            _, token, logit = every.gather(0, winner)[0]
            proposals, probability = token.long(), (logit - logsum).exp().float()
        return proposals, {"probability": probability, "margin": margin, "neg_entropy": -entropy, None: probability * 0}
