"""Logits to proposals: guidance, warpers, arg-max or Gumbel-max, and the confidence of what is proposed."""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..kernels.vocabulary import best_tokens, best_tokens_torch
from .configuration import DiffusionGenerationConfig


class Noise:
    """The random numbers of one step.

    Args:
        device: where they are needed; they are drawn where the generator lives.
        generator: one for the batch, `None` for torch's own, or a list with one for each row: a row's numbers are then
            the same whatever rows stand beside it.
        widths: with a list, the columns of each row's block; 0 where a row takes no part in the step, whose generator
            stays as it is.
    """

    def __init__(self, device: torch.device, generator=None, widths: list[int] | None = None):
        self.device, self.generator, self.widths = device, generator, widths

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """Uniform in [0, 1), float32."""
        return self._draw(shape, lambda size, **kwargs: torch.rand(size, **kwargs))

    def gumbel(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard Gumbel, float64: in float32 its tail is cut off, which costs quality (arXiv:2409.02908)."""

        def draw(size, generator, device):
            return -torch.empty(size, dtype=torch.float64, device=device).exponential_(generator=generator).log_()

        return self._draw(shape, draw)

    def _draw(self, shape, draw):
        if not isinstance(self.generator, (list, tuple)):
            source = self.device if self.generator is None else self.generator.device
            return draw(tuple(shape), generator=self.generator, device=source).to(self.device)
        noise = None
        for row, (generator, width) in enumerate(zip(self.generator, self.widths, strict=True)):
            drawn = draw((width, *shape[2:]), generator=generator, device=generator.device)
            noise = torch.zeros(shape, dtype=drawn.dtype, device=self.device) if noise is None else noise
            noise[row, :width] = drawn.to(self.device)
        return noise


def guide(logits: torch.Tensor, cfg_scale: float) -> torch.Tensor:
    """Classifier-free guidance as in LLaDA: `uncond + (cfg_scale + 1) * (cond - uncond)`.

    `logits`: `(2 * batch, block, vocab)`, the conditional rows first. Returns `(batch, block, vocab)`.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def make_processors(config: DiffusionGenerationConfig) -> list:
    """The library's processors that a configuration asks for, which read the sequence."""
    penalty = config.repetition_penalty
    return [] if penalty in (None, 1) else [RepetitionPenaltyLogitsProcessor(float(penalty))]


def make_warpers(config: DiffusionGenerationConfig) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The library's warpers in the library's order: temperature, and the filters that leave the best tokens only."""
    temperature, filters = LogitsProcessorList(), LogitsProcessorList()
    if config.sampling_temperature not in (0, 1):
        temperature.append(TemperatureLogitsWarper(config.sampling_temperature))
    if config.top_k:
        filters.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        filters.append(TopPLogitsWarper(float(config.top_p)))
    if config.min_p:
        filters.append(MinPLogitsWarper(float(config.min_p)))
    return temperature, filters


def process(processors: LogitsProcessorList, input_ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Run logits processors, which know `(rows, vocab)`, over `(batch, block, vocab)`.

    `input_ids`: `(batch, length)`, what a processor that looks at the sequence sees for every position of its row.
    """
    batch, block, vocab = logits.shape
    if input_ids is not None:
        input_ids = input_ids.repeat_interleave(block, dim=0)
    return processors(input_ids, logits.reshape(batch * block, vocab)).view(batch, block, vocab)


def propose(logits: torch.Tensor, mask_token_id: int, temperature: float, noise: Noise) -> torch.Tensor:
    """The proposed token of each position, never the mask.

    The arg-max at temperature 0, else a draw from `softmax(logits)` (the temperature is already in the logits) by the
    Gumbel-max trick.

    `logits`: `(batch, block, vocab)`, unchanged on return. Returns `(batch, block)`.
    """
    mask_logit = logits[..., mask_token_id].clone()
    logits[..., mask_token_id] = -torch.inf
    if temperature > 0:
        proposals = (logits.double() + noise.gumbel(logits.shape)).argmax(-1)
    else:
        proposals = logits.argmax(-1)
    logits[..., mask_token_id] = mask_logit
    return proposals


def confidence(kind: str | None, logits: torch.Tensor, proposals: torch.Tensor, mask_token_id: int, noise: Noise):
    """How sure the model is of its proposals.

    Args:
        kind: `probability` of the proposal, `margin` between the two best tokens, `neg_entropy` of the distribution
            (nats), `random`, or `None` where the selection reads no confidence.
        logits: `(batch, block, vocab)`. The mask token counts in the distribution, as it does in the originals.
        proposals: `(batch, block)`.

    Returns:
        `(batch, block)` float32.
    """
    if kind is None:
        return torch.zeros(proposals.shape, dtype=torch.float32, device=proposals.device)
    if kind == "random":
        return noise.uniform(proposals.shape)
    log_probs = logits.float().log_softmax(-1)
    if kind == "probability":
        return log_probs.gather(-1, proposals[..., None]).squeeze(-1).exp()
    probs = log_probs.exp()
    if kind == "neg_entropy":
        return -torch.special.entr(probs).sum(-1)
    mask_prob = probs[..., mask_token_id].clone()
    probs[..., mask_token_id] = 0
    best, second = probs.topk(2, dim=-1).values.unbind(-1)
    return best - torch.maximum(second, mask_prob)


def read_best(kind: str | None, logits: torch.Tensor, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[`propose`] at temperature 0 and [`confidence`] in one pass over the logits. `kind` is not `random`."""
    read = best_tokens if logits.is_cuda else best_tokens_torch
    proposals, probability, margin, entropy = read(logits, mask_token_id)
    if kind is None:
        return proposals, torch.zeros_like(probability)
    return proposals, {"probability": probability, "margin": margin, "neg_entropy": -entropy}[kind]
