"""Logits to proposals: guidance, warpers, arg-max or Gumbel-max, and the scores of the proposals."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from ..kernels.best_tokens import best_tokens
from ..kernels.triton import has_kernels
from .configuration import DiffusionGenerationConfig
from .uploads import uploaded

# Tokens in a chunk of [`first_of_the_largest`]; logits in a piece of [`score`], and of [`distribution`] on a GPU.
CHUNK, PIECE, PIECE_ON_GPU = 128, 65536, 2**26


class Noise:
    """Random numbers for the rows of a step.

    Args:
        device: of the numbers; they are drawn on the device of a generator.
        generators: of each row; None is PyTorch's own. If all rows share one generator, they share one draw. Otherwise each
            row draws exactly the numbers that it needs, so that they do not depend on the other rows.
        widths: the columns of each row's block; 0 for a row that needs no numbers.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator | None], widths: Sequence[int]):
        self.device, self.generators, self.widths = device, generators, widths

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """Uniform in [0, 1), float32."""
        return self._draw(shape, lambda size, **kwargs: torch.rand(size, **kwargs))

    def gumbel(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard Gumbel, float64: in float32 its tail is cut off, which costs quality (arXiv:2409.02908)."""

        def draw(size, generator, device):
            return -torch.empty(size, dtype=torch.float64, device=device).exponential_(generator=generator).log_()

        return self._draw(shape, draw)

    def _draw(self, shape, draw):
        source = lambda generator: self.device if generator is None else generator.device
        first = self.generators[0]
        if all(each is first for each in self.generators):
            noise = draw(tuple(shape), generator=first, device=source(first)).to(self.device)
            if all(self.widths):
                return noise
            idle = uploaded(torch.tensor([not width for width in self.widths]), torch.device(self.device))
            return noise.masked_fill_(idle.view(-1, *[1] * (len(shape) - 1)), 0)
        noise = None
        for row, (generator, width) in enumerate(zip(self.generators, self.widths, strict=True)):
            drawn = draw((width, *shape[2:]), generator=generator, device=source(generator))
            noise = torch.zeros(shape, dtype=drawn.dtype, device=self.device) if noise is None else noise
            noise[row, :width] = drawn.to(self.device)
        return noise


def guide(logits: torch.Tensor, cfg_scale: float) -> torch.Tensor:
    """Classifier-free guidance as in LLaDA: `uncond + (cfg_scale + 1) * (cond - uncond)`.

    `logits`: `(2 * rows, block, vocab)`, the conditional rows first. Returns `(rows, block, vocab)`.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def make_processors(config: DiffusionGenerationConfig) -> list:
    """The library's processors of a configuration that read the sequence."""
    penalty = config.repetition_penalty
    return [] if penalty in (None, 1) else [RepetitionPenaltyLogitsProcessor(float(penalty))]


def process(processors: LogitsProcessorList, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Run logits processors, which take `(rows, vocab)`, over `(rows, block, vocab)`.

    `input_ids`: `(rows, length)`, the sequence that processors see for every position of a row.
    """
    rows, block, vocab = logits.shape
    # The library annotates a class of which no tensor is an instance.
    input_ids = cast(torch.LongTensor, input_ids.repeat_interleave(block, dim=0))
    return processors(input_ids, logits.reshape(rows * block, vocab)).view(rows, block, vocab)


def filtered(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The library's top-k, top-p and min-p warpers, in its order, with one set of numbers for each row.

    Args:
        logits: `(rows, block, vocab)`.
        top_k, top_p, min_p: `(rows, 1, 1)`; 0, 1 and 0 change nothing.

    Returns:
        The logits, with -inf for tokens that are left out.
    """
    rising, tokens = logits.sort(dim=-1)
    vocab = logits.shape[-1]
    kept = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
    least = rising.gather(-1, (vocab - kept).expand(*logits.shape[:2], 1))
    rising = rising.masked_fill(rising < least, -torch.inf)
    out = rising.softmax(-1).cumsum(-1) <= 1 - top_p
    out[..., -1] = False
    out &= top_p < 1
    rising = rising.masked_fill(out, -torch.inf)
    probabilities = rising.softmax(-1)
    out = probabilities < min_p * probabilities[..., -1:]
    out[..., -1] = False
    rising = rising.masked_fill(out, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, tokens, rising)


def propose(
    logits: torch.Tensor, mask_token_id: int, scores: frozenset[str | None], gumbel: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str | None, torch.Tensor]]:
    """The proposed token of each position, never the mask, and its scores.

    Args:
        logits: `(rows, block, vocab)`, unchanged on return. The mask counts in the distribution, as in the originals.
        scores: the names of the scores: `probability` of the proposal, `margin` between the two best tokens, `neg_entropy`
            of the distribution (nats), None for zeros.
        gumbel: as `logits`, float64: the proposal is then a draw from `softmax(logits)` by the Gumbel-max trick.

    Returns:
        `(rows, block)` tokens, and by name the scores, `(rows, block)` float32, NaN where the logits are.
    """
    if gumbel is None and has_kernels(logits):
        proposals, probability, margin, entropy = best_tokens(logits, mask_token_id)
        found = {"probability": probability, "margin": margin}
        found |= {"neg_entropy": -entropy} if "neg_entropy" in scores else {}
        return proposals, found | ({None: probability * 0} if None in scores else {})
    mask_logit = logits[..., mask_token_id].clone()
    logits[..., mask_token_id] = -torch.inf
    proposals = first_of_the_largest(logits) if gumbel is None else (logits.double() + gumbel).argmax(-1)
    logits[..., mask_token_id] = mask_logit
    return proposals, {name: score(name, logits, proposals, mask_token_id) for name in scores}


def first_of_the_largest(logits: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(-1)` in two levels. On a CPU PyTorch vectorises `amax` and not `argmax`, which is five times slower."""
    padding = -logits.shape[-1] % CHUNK
    padded = torch.nn.functional.pad(logits, (0, padding), value=-torch.inf) if padding else logits
    chunks = padded.unflatten(-1, (-1, CHUNK))
    chunk = chunks.amax(-1).argmax(-1, keepdim=True)
    token = chunks.take_along_dim(chunk[..., None], dim=-2).squeeze(-2).argmax(-1, keepdim=True)
    return (chunk * CHUNK + token).squeeze(-1)


def score(name: str | None, logits: torch.Tensor, proposals: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """One of the scores of [`propose`]. On a CPU a few positions at a time: temporaries as large as the logits cost more in
    page faults than in arithmetic."""
    if logits.is_cuda:
        return score_whole(name, logits, proposals, mask_token_id)
    positions = max(PIECE // logits.shape[-1], 1)
    pieces = zip(logits.flatten(0, 1).split(positions), proposals.flatten().split(positions), strict=True)
    return torch.cat([score_whole(name, *piece, mask_token_id) for piece in pieces]).view_as(proposals)


def score_whole(name: str | None, logits: torch.Tensor, proposals: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """[`score`] of all positions at once."""
    if name is None:
        is_nan = logits.gather(-1, proposals[..., None]).squeeze(-1).isnan()
        return torch.zeros(proposals.shape, device=logits.device).masked_fill(is_nan, torch.nan)
    log_probs = logits.float().log_softmax(-1)
    if name == "probability":
        return log_probs.gather(-1, proposals[..., None]).squeeze(-1).exp()
    probs = log_probs.exp()
    if name == "neg_entropy":
        return -torch.special.entr(probs).sum(-1)
    mask_prob = probs[..., mask_token_id].clone()
    probs[..., mask_token_id] = 0
    best, second = probs.topk(2, dim=-1).values.unbind(-1)
    return best - torch.maximum(second, mask_prob)


def distribution(logits: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the log-probabilities of a step are made of, computed in float32 a few positions at a time: a copy of all logits
    would take twice their memory in bfloat16.

    Args:
        logits: `(rows, block, vocab)`.
        most: how many of the most probable tokens are wanted.

    Returns:
        The logarithm of the sum of the exponentials, `(rows, block)`; the largest log-probabilities, falling, and their
        tokens, `(rows, block, most)`. Float32 and int64.
    """
    parts = []
    for piece in logits.flatten(0, 1).split(max((PIECE_ON_GPU if logits.is_cuda else PIECE) // logits.shape[-1], 1)):
        piece = piece.float()
        total = piece.logsumexp(-1, keepdim=True)
        top, tokens = piece.topk(most)
        parts.append((total.squeeze(-1), top - total, tokens))
    total, top, tokens = (torch.cat(each).unflatten(0, logits.shape[:2]) for each in zip(*parts))
    return total, top, tokens
