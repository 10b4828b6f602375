"""Bounds on the log-likelihood of a text.

Positions that are decoded together are predicted from every set of the others, so that they have no likelihood of their own
that could be computed; what can is the expectation over random orders, one token a step, which bounds it from below. For n
positions x with a context c

    log p(x | c)  >=  sum over l from 1 to n of  1/l * mean over sets S of l positions of  sum over i in S of
                      log p(x_i | c, x without S)

(Uria et al., arXiv:1310.1757; as the bound of LLaDA, arXiv:2502.09992, equations 4 and 6, integrated over its rate). Where
blocks see earlier ones alone, a text's log-likelihood is exactly the sum of its blocks', each given those before it, and the
bound is on each block.
"""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy
import torch

from ..generation.evaluation_mode import evaluating
from ..generation.requests import Row

MAX_LOGITS = 2**26  # that are in float32 at a time


@dataclass
class LogLikelihoodOutput:
    """What [`log_likelihood`] returns, on the CPU.

    Args:
        log_likelihood (`torch.DoubleTensor` of shape `(batch,)`): in nats, of all scored tokens of a row together.
        standard_error (`torch.DoubleTensor` of shape `(batch,)`): what the drawn masks leave uncertain of the bound; 0 where
            all masks were computed. Rows are drawn independently.
        num_tokens (`torch.LongTensor` of shape `(batch,)`): the scored tokens.
        num_forward_passes (`int`): of the whole call, each over up to `batch_size` noisy texts.
    """

    log_likelihood: torch.Tensor
    standard_error: torch.Tensor
    num_tokens: torch.Tensor
    num_forward_passes: int


def log_likelihood(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    *,
    num_samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
) -> LogLikelihoodOutput:
    """A lower bound of the log-likelihood of texts, or of parts of them given the rest.

    What is decoded together is a block of the model's own decoding (of Fast-dLLM v2 a sub-block, and the seed of a block by
    itself); for models that see the whole canvas it is all that is scored. A last block that the text does not fill is
    filled up with masks where decoding does so. The distribution is that of the logits: nothing is suppressed, the mask
    counts.

    Masks are drawn in strata: two for each of `num_samples / 2` equal slices of the share that is masked, and the differences
    of the two give the standard error. Where a block has no more than `num_samples` sets of positions (blocks
    of 4: 15, of 7: 127), all of them are computed instead, and the bound is exact.

    Args:
        input_ids: `(batch, length)`, without masks.
        attention_mask: `(batch, length)`, 0 on padding, which may be on either side.
        labels: `(batch, length)`, -100 at tokens that are given and not scored, such as a prompt, and the token itself
            elsewhere, as for training. By default all tokens are scored. Where blocks see earlier ones alone, tokens
            given behind a block do not count for it.
        num_samples: masks for each block, an even number.
        batch_size: noisy texts in a forward pass.
        seed: masks depend on it and on the row's tokens, not on the rows beside it.

    Raises:
        ValueError: names the argument that is wrong and what to do.
    """
    check_sizes(num_samples, batch_size)
    rows = _rows(model, input_ids, attention_mask, labels)
    texts = [_Text(model, *row, seed) for row in rows]
    # Texts of one pass are about as long.
    order = sorted(texts, key=lambda text: -len(text.canvas))
    passes = 0
    with torch.no_grad(), evaluating(model.modules()):
        for some in _batches((text for text in order if text.seeds), batch_size):
            _add_seeds(model, some)
            passes += 1
        turns = (turn for text in order for turn in text.turns(num_samples))
        for noisy in _batches(((turn, index) for turn in turns for index in range(turn.left)), batch_size):
            _add_noisy(model, noisy)
            passes += 1
    return LogLikelihoodOutput(
        torch.tensor([text.total for text in texts], dtype=torch.float64),
        torch.tensor([math.sqrt(text.variance) for text in texts], dtype=torch.float64),
        torch.tensor([int(text.scored.sum()) for text in texts]),
        passes,
    )


def check_sizes(num_samples: Any, batch_size: Any) -> None:
    """Raises a `ValueError` for numbers that [`log_likelihood`] does not take."""
    for name, value, least in (("num_samples", num_samples, 2), ("batch_size", batch_size, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, but is {value!r}.")
    if num_samples % 2:
        raise ValueError(f"`num_samples={num_samples}` is odd: masks are drawn in pairs, give an even number.")


def _rows(model, input_ids, attention_mask, labels) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Of each row without its padding, the tokens and which of them are scored, `(length,)` each."""
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask), ("labels", labels)):
        if value is None and name != "input_ids":
            continue
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.is_floating_point():
            raise ValueError(f"`{name}` must be a `(batch, length)` tensor of integers, but is {shape}.")
        if value.shape != input_ids.shape:
            raise ValueError(f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}, but has {shape}.")
    ids = input_ids.cpu().long().numpy()
    real = numpy.ones_like(ids, dtype=bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    begins = numpy.diff(numpy.pad(real, ((0, 0), (1, 0))).astype(int), axis=1) == 1
    if (begins.sum(1) > 1).any():
        raise ValueError("`attention_mask` has holes: padding may stand before and behind a text only.")
    scored = real.copy() if labels is None else real & (labels.cpu().numpy() != -100)
    if labels is not None and (labels.cpu().numpy() != ids)[scored].any():
        raise ValueError(
            "`labels` are not the tokens of `input_ids` at the same positions: give clean text, and the token itself where "
            "it is scored, -100 elsewhere."
        )
    vocab, mask = model.config.vocab_size, _mask_of(model)
    if ((ids < 0) | (ids >= vocab))[real].any():
        raise ValueError(f"`input_ids` holds a token that the vocabulary of {vocab} tokens lacks.")
    if (ids == mask)[real].any():
        raise ValueError(f"`input_ids` holds the mask, {mask}: give the clean text. Masks are drawn here.")
    longest, positions = int(real.sum(1).max(initial=0)), getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"A text of {longest} tokens is longer than the {positions} positions of the model: shorten it."
        )
    return [(row[own], each[own]) for row, own, each in zip(ids, real, scored, strict=True)]


def _mask_of(model: Any) -> int:
    own = model.generation_config.mask_token_id
    mask = model.config.mask_token_id if own is None else own
    if mask is None:
        raise ValueError("The model's configuration has no `mask_token_id`: set it.")
    return mask


class _Text:
    """A row, and what is known of its likelihood so far.

    canvas: `(length,)`, its tokens, filled up with masks as decoding does. scored: of its tokens.
    seeds: positions that the clean text before them decides.
    cells: for each block of the grid what of it is decoded together, one after the other, as arrays of positions.
    block_length, block_start: of the grid; 0 where there is none.
    total, variance: of the log-likelihood.
    """

    def __init__(self, model: Any, tokens: numpy.ndarray, scored: numpy.ndarray, seed: int):
        self.scored, self.canvas, self.total, self.variance = scored, tokens, 0.0, 0.0
        self.mask = _mask_of(model)
        self.seeds, self.cells = list[int](), list[list[numpy.ndarray]]()
        self.block_length = self.block_start = 0
        # 32 bits, since PyTorch's generator on the CPU reads no more.
        number = zlib.crc32(scored.tobytes(), zlib.crc32(tokens.tobytes(), zlib.crc32(str(seed).encode())))
        self.generator = torch.Generator().manual_seed(number)
        if not scored.any():
            return
        if not model.sees_earlier_blocks:
            self.cells = [[numpy.flatnonzero(scored)]]
            return
        given = numpy.flatnonzero(~scored)
        length = int(given[-1]) + 1 if len(given) else 0  # of what decoding would be given as the prompt
        prompt = numpy.where(scored, self.mask, tokens)[:length].tolist()
        request = model.diffusion_request(prompt, max_new_tokens=len(tokens) - length, self_speculation=False)
        row = Row(request, 0, model.block_grid, True, model.logits_shift, model.seeds_blocks, model.causal_context)
        self.canvas = numpy.concatenate([tokens, numpy.array(row.text[len(tokens) :], dtype=tokens.dtype)])
        self.block_length = request.options.block_length
        self.block_start = 0 if model.block_grid == "zero" else length % self.block_length
        cells: dict[tuple[int, int], list[numpy.ndarray]] = {}
        for part in row.blocks:
            start, end = part.span
            if part.is_seed:
                self.seeds.append(start)
            else:
                cells.setdefault(part.cell, []).append(start + numpy.flatnonzero(scored[start:end]))
        self.cells = list(cells.values())

    def turns(self, num_samples: int) -> "Iterator[_Turn]":
        """What is computed, as it is asked for: the first part of each block, then the second of those that have one, ..."""
        for turn in range(max(map(len, self.cells), default=0)):
            canvas = self.canvas.copy()
            for cell in self.cells:
                canvas[numpy.concatenate([*cell[turn + 1 :], numpy.empty(0, dtype=int)])] = self.mask
            parts = [cell[turn] for cell in self.cells if len(cell) > turn]
            yield _Turn(self, canvas, parts, [draw_masks(len(part), num_samples, self.generator) for part in parts])


class Draws(NamedTuple):
    """Masks of n positions that are decoded together.

    masks: `(number, n)` bool, True where a position is masked.
    weights: `(number,)`, what the sum of a mask's log-probabilities counts in the bound.
    are_all: whether these are all masks; otherwise each two of one stratum are neighbours.
    """

    masks: numpy.ndarray
    weights: numpy.ndarray
    are_all: bool


def draw_masks(n: int, num_samples: int, generator: torch.Generator) -> Draws:
    if 2**n - 1 <= num_samples:
        masks = (numpy.arange(1, 2**n)[:, None] >> numpy.arange(n)) & 1 == 1
        sizes = masks.sum(1)
        return Draws(masks, 1 / (sizes * numpy.array([math.comb(n, size) for size in sizes])), True)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()
    strata = numpy.arange(num_samples) // 2
    sizes = numpy.minimum((2 * (strata + draw(num_samples)) / num_samples * n).astype(int), n - 1) + 1
    ranks = draw(num_samples, n).argsort(1).argsort(1)
    return Draws(ranks < sizes[:, None], n / (num_samples * sizes), False)


class _Turn:
    """Parts of a text that are computed side by side, one of each block.

    canvas: the text as it is before masks are put in. parts, draws: positions and masks of each.
    masked: `(number, length)` bool, the masks of all parts together. found: the log-probabilities there.
    """

    def __init__(self, text: _Text, canvas: numpy.ndarray, parts: list[numpy.ndarray], draws: list[Draws]):
        self.text, self.canvas, self.parts, self.draws = text, canvas, parts, draws
        self.left = max(len(each.masks) for each in draws)
        self.masked = numpy.zeros((self.left, len(canvas)), dtype=bool)
        for part, each in zip(parts, draws):
            self.masked[: len(each.masks), part] = each.masks
        self.found = numpy.zeros(self.masked.shape)

    def add(self, index: int, log_probs: numpy.ndarray) -> None:
        """Take what a noisy text gave, and with the last of them the sum."""
        self.found[index, self.masked[index]] = log_probs
        self.left -= 1
        if self.left:
            return
        for part, (masks, weights, are_all) in zip(self.parts, self.draws):
            terms = self.found[: len(masks), part].sum(1) * weights
            self.text.total += terms.sum()
            if not are_all:
                self.text.variance += numpy.square(terms[0::2] - terms[1::2]).sum()


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def _padded(rows: list[numpy.ndarray], filler: int = 0) -> torch.Tensor:
    padded = numpy.full((len(rows), max(map(len, rows))), filler, dtype=numpy.int64)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def _inputs(model: Any, rows: list[numpy.ndarray]) -> dict[str, torch.Tensor | None]:
    ids = _padded(rows).to(model.device)
    seen = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": None if seen.all() else seen.long().to(model.device)}


def _log_probs(logits: torch.Tensor, rows: list[numpy.ndarray], positions: list[numpy.ndarray]) -> list[numpy.ndarray]:
    """Of the tokens at some positions of each row, by `(batch, kept, vocab)` logits."""
    tokens = _padded([row[kept] for row, kept in zip(rows, positions)]).to(logits.device)[..., None]
    at_once = max(MAX_LOGITS // logits[0].numel(), 1)
    found = []
    for first in range(0, len(logits), at_once):
        some = logits[first : first + at_once]
        some = some if some.dtype == torch.float64 else some.float()
        found.append(some.gather(2, tokens[first : first + at_once])[..., 0] - some.logsumexp(-1))
    every = torch.cat(found).double().cpu().numpy()
    return [values[: len(kept)] for values, kept in zip(every, positions)]


def _add_seeds(model: Any, texts: list[_Text]) -> None:
    """One pass over clean texts, whose logits before a block are those of its seed."""
    seeds = [numpy.array(text.seeds) for text in texts]
    keep = _padded([each - 1 for each in seeds]).to(model.device)
    attention: dict[str, Any] = {"block_size": texts[0].block_length}
    if model.causal_context:
        attention = {"use_causal_mask": True}
    rows = [text.canvas for text in texts]
    output = model(**_inputs(model, rows), logits_to_keep=keep, use_cache=False, **attention)
    for text, log_probs in zip(texts, _log_probs(output.logits, rows, seeds)):
        text.total += log_probs.sum()


def _add_noisy(model: Any, batch: list[tuple[_Turn, int]]) -> None:
    """One pass over noisy texts."""
    masked = [turn.masked[index] for turn, index in batch]
    clean = [turn.text.canvas for turn, _ in batch]
    noisy = [numpy.where(each, turn.text.mask, turn.canvas) for (turn, _), each in zip(batch, masked)]
    inputs = _inputs(model, noisy)
    labels = [numpy.where(row == text, -100, text) for row, text in zip(noisy, clean)]
    positions = [numpy.flatnonzero(each) for each in masked]
    keep = _padded([numpy.maximum(each - model.logits_shift, 0) for each in positions]).to(model.device)
    blocks = {}
    if model.sees_earlier_blocks:
        starts = torch.tensor([[turn.text.block_start] for turn, _ in batch]).to(model.device)
        blocks = {"block_size": batch[0][0].text.block_length, "block_starts": starts}
    logits = model.predict_noisy(
        labels=_padded(labels, -100).to(model.device), logits_to_keep=keep, **inputs, **blocks
    ).logits
    for (turn, index), log_probs in zip(batch, _log_probs(logits, clean, positions)):
        turn.add(index, log_probs)
