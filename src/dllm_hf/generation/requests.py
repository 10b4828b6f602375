"""`Request`, what a caller asks for one row, and `Row`, its state on the host: blocks, step, what the next pass feeds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress
from typing import NamedTuple

import numpy
import torch

from .configuration import DiffusionGenerationConfig
from .drafts import drafts_of
from .inputs import as_array
from .remasking import STRATEGIES, Strategy, bernoulli_plan, transfer_quotas
from .window import DRAFT, VERIFICATION, Frame

# As many of the most probable tokens as OpenAI's API gives.
MAX_LOGPROBS = 20

# What the first pass of a block feeds, and what its other passes feed.
POLICIES = {
    # Every pass feeds and sees the whole canvas. Exact.
    "none": ("canvas", "canvas"),
    # Fast-dLLM, arXiv:2505.22618, section 3.2: keys and values before the block are those of the block's first pass ...
    "prefix": ("canvas", "from the block"),
    # ... and those after the block as well.
    "dual": ("canvas", "block"),
    # For blocks that see earlier ones alone: a block's first pass also feeds the final columns that the cache lacks, the
    # prompt before the first block, then each finished block. Exact.
    "block": ("not yet final", "block"),
}


@dataclass(frozen=True)
class Request:
    """What a caller asks for one row.

    prompt: token ids; masks in it are positions to fill.
    max_new_tokens: masks to append.
    options: with special tokens, `remasking_strategy` and `cache_policy` set; a `block_length` of None puts all masks into
        one block.
    generator: draws for this row; None is PyTorch's own. Rows that share one share their draws.
    quota_source: see [`contract.DenoisingModel`].
    logprobs: see [`DiffusionGenerationMixin.diffusion_generate`].
    is_constrained: whether the caller says before each step which tokens it may propose, see [`canvas.Canvas.allow`].
    """

    prompt: list[int]
    max_new_tokens: int
    options: DiffusionGenerationConfig
    generator: torch.Generator | None = None
    quota_source: str = "masks"
    logprobs: int | None = None
    is_constrained: bool = False

    def __post_init__(self) -> None:
        if self.logprobs is not None and (type(self.logprobs) is not int or not 0 <= self.logprobs <= MAX_LOGPROBS):
            raise ValueError(f"`logprobs` must be an integer from 0 to {MAX_LOGPROBS}, but is {self.logprobs!r}.")

    @cached_property
    def ids(self) -> numpy.ndarray:
        """The prompt, `(prompt,)`."""
        return as_array(self.prompt)

    @cached_property
    def given(self) -> int:
        """How many tokens of the prompt stand before its first mask."""
        (masks,) = (self.ids == self.options.mask_token_id).nonzero()
        return int(masks[0]) if len(masks) else len(self.prompt)

    def length(self, block_grid: str) -> int:
        """Columns of the canvas. With the grid at 0, a last block that holds masks is filled up with masks."""
        size, length = self.options.block_length or 1, len(self.prompt) + self.max_new_tokens
        last = self.prompt[-(length % size or size) :]
        if block_grid == "zero" and (self.max_new_tokens or self.options.mask_token_id in last):
            length += -length % size
        return length

    def columns(self, block_grid: str) -> int:
        """Columns that it takes in a cache: its canvas and the scratch column."""
        return self.length(block_grid) + 1

    def canvas(self, block_grid: str) -> list[int]:
        """Prompt and positions to fill."""
        return [*self.prompt, *[self.options.mask_token_id] * (self.length(block_grid) - len(self.prompt))]


class Part(NamedTuple):
    """Columns that are decoded together: a block of the grid, or of such a block its seed or a sub-block.

    span: the first column, and the one behind the last.
    masks: how many of the columns are masked.
    steps: denoising steps; None for one token a step.
    cell: the block, which the passes feed.
    sub_block: the sub-block, of which the seed may have decided the first column.
    is_seed: whether it is the block's first token, decided by the text before the block.
    """

    span: tuple[int, int]
    masks: int
    steps: int | None
    cell: tuple[int, int]
    sub_block: tuple[int, int]
    is_seed: bool


class Row:
    """A row that is being decoded, as numbers on the host. Position = column; the canvas is the prompt and the positions
    to fill.

    Args:
        slot: the row's index in the buffers.
        block_grid, sees_earlier_blocks, logits_shift, seeds_blocks, causal_context: as in [`backend.Backend`].

    Attributes:
        text: the canvas before the first step.
        blocks: what is decoded, one after the other, each a [`Part`]; `part` and its `cell` are those of the present one.
        shown, length: the number of columns that the output shows, and of all.
        edits: whether tokens of a block may be replaced until it is done.
        is_adaptive: whether it depends on the logits how many steps a block takes.
        speculates: whether blocks are drafted and verified, see [`self_speculation`]. Where the next one begins depends on how
            much of the draft is kept, so that `blocks` ends with the present one.
        causal_grid: the block length where blocks see earlier ones alone, 0 where a token sees the whole row.
        final_length: the column up to which the cache holds final keys and values (policy `block`).
        whole_cell: the block of which a pass has fed all columns last.
        first_is_masked: whether the first column of the sub-block is masked, as far as the host knows.
        draft_steps: how many drafts a pass has at most, see [`drafts`].
        leaps: whether a pass may then take several steps: nobody watches them one by one. `step` is how many the block has had
            at least, and `most_steps` how many at most: the device knows.
        passes: forward passes that the row took part in.
        is_done: whether no block is left to decode. has_ended: whether the row was ended before its last block.
    """

    def __init__(
        self,
        request: Request,
        slot: int,
        block_grid: str,
        sees_earlier_blocks: bool,
        logits_shift: int,
        seeds_blocks: bool = False,
        causal_context: bool = False,
    ):
        options = request.options
        self.seeds_blocks, self.causal_context = seeds_blocks, causal_context
        self.request, self.slot, self.block_grid, self.logits_shift = request, slot, block_grid, logits_shift
        self.block_length, self.mask = options.block_length, options.mask_token_id
        self.speculates = options.self_speculation
        # Of a draft every proposal counts.
        self.strategy: Strategy = STRATEGIES["sequential" if self.speculates else options.remasking_strategy]
        self.first_feeds, self.others_feed = POLICIES[options.cache_policy]
        self.edits = options.editing_threshold is not None and options.editing_threshold < 1  # no probability exceeds 1
        self.is_adaptive = self.strategy.is_adaptive or self.edits
        self.uses_block_cache = options.use_block_cache
        size = self.block_length or 1
        self.causal_grid = (self.block_length or 0) if sees_earlier_blocks else 0
        # A piece of a prompt must not end inside a block, whose tokens see each other.
        self.chunk = max(options.prefill_chunk_size // size, 1) * size
        self.shown = len(request.prompt) + request.max_new_tokens
        self.text = request.canvas(block_grid)
        self.length, self.final_length, self.passes = len(self.text), 0, 0
        self.ends_at, self.has_ended = self.shown, False
        self.draft_steps, self.leaps = 0, False
        self.begin(self.text, request.given)

    def begin(self, text: list[int], given: int = 0) -> None:
        """Start to decode the masks of `text`, the row's present canvas. `given`: no column before it holds one."""
        self.blocks = self._speculative_blocks(0) if self.speculates else self._blocks(text, given)
        self.taken, self.quotas = 0, list[int]()
        self._go_to(0)
        self.whole_cell: tuple[int, int] | None = None
        self.first_is_masked = False

    def _blocks(self, text: list[int], given: int) -> list[Part]:
        """What is decoded of a text, one after the other."""
        cells = self._cells(text, given)
        steps: list[int | None] = [self.request.options.denoising_steps] * len(cells)
        if self.request.options.steps is not None:
            steps = spread(self.request.options.steps, len(cells))
        if self.request.quota_source == "block":
            to_fill = text[: self.shown].count(self.mask)
            steps = [None if number is None else min(number, to_fill) for number in steps]
        return [part for cell, number in zip(cells, steps) for part in self._parts(text, cell, number)]

    def _cells(self, text: list[int], given: int) -> list[tuple[int, int]]:
        """The grid's cells that hold masks among the columns that are shown, as (start, end)."""
        try:
            first, length = text.index(self.mask, given, self.shown), self.block_length
        except ValueError:
            return []
        if length is None:
            return [(first, len(text))]
        anchor = 0 if self.block_grid == "zero" else len(self.request.prompt) % length
        # The cell of the first mask; the beginning of the canvas cuts the cell before the anchor short.
        start = anchor + (first - anchor) // length * length
        cells = [(max(cell, 0), min(cell + length, len(text))) for cell in range(start, len(text), length)]
        return [cell for cell in cells if self.mask in text[cell[0] : min(cell[1], self.shown)]]

    def _parts(self, text: list[int], cell: tuple[int, int], steps: int | None) -> list[Part]:
        """What of a cell is decoded, one after the other."""
        start, end = cell
        has_seed = self.seeds_blocks and start > 0
        parts = []
        if has_seed and text[start] == self.mask:
            parts.append(Part((start, start + 1), 1, 1, cell, (start, start + 1), True))
        size, spans = self.request.options.small_block_size or end - start, {}
        for first in range(start, end, size):
            last = min(first + size, end)
            span = (max(first, start + has_seed), last)
            if self.mask in text[span[0] : min(last, self.shown)]:
                spans[first, last] = span
        each: list[int | None] = [None] * len(spans) if steps is None else spread(steps, len(spans))
        for (sub_block, span), number in zip(spans.items(), each):
            parts.append(Part(span, text[slice(*span)].count(self.mask), number, cell, sub_block, False))
        return parts

    def _speculative_blocks(self, column: int) -> list[Part]:
        """The block that begins with the first mask from `column` on, if there is one. Before the first block the clean text
        gives a single token, since a draft begins with the last one that is known."""
        try:
            start = self.text.index(self.mask, column, self.shown)
        except ValueError:
            return []
        end = min(start + self.block_length, self.shown) if column else start + 1
        masks = self.text[start:end].count(self.mask)
        if masks == 1:  # which needs no draft
            end = start + 1
        return [Part((start, end), masks, 1, (start, end), (start, end), start > 0)]

    def _go_to(self, index: int) -> None:
        """Make a block the present one, unless there is none left."""
        self.block_index, self.is_open, self.is_done = index, False, index == len(self.blocks)
        if not self.is_done:
            self.part = self.blocks[index]
            self.cell = self.part.cell

    @property
    def span(self) -> tuple[int, int]:
        start, end = self.part.span
        return start, end - self.is_drafting  # a verification feeds the draft and decides one token more

    def open_block(
        self, uniform: Callable[[int], torch.Tensor], masked: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Make the quotas of a block before its first step.

        Args:
            uniform: `width -> (width,)`, uniform numbers of the row's generator.
            masked: `(width,)` bool, the block's masks where a hook may have changed those of [`Row.text`].

        Returns:
            `(width,)` on the CPU, the step at which each position may be transferred, where the strategy draws it; steps that
            transfer nothing do not count.
        """
        (start, end), masks, steps, _, sub_block, _ = self.part
        self.is_open, self.is_first, self.step, self.most_steps, self.taken = True, True, 0, 0, 0
        self._later_frame: Frame | None = None  # of all passes of the block but the first
        first_is_masked = self.text[start] == self.mask if masked is None else bool(masked[0])
        self.first_is_masked = first_is_masked and start == sub_block[0]
        if masked is not None:  # a block whose shown part has no mask is not decoded
            masks = int(masked.sum()) if masked[: self.shown - start].any() else 0
        if self.strategy.selection != "bernoulli":
            whole = (self.block_length or masks) if self.request.quota_source == "block" else masks
            self._set_quotas([*transfer_quotas(masks, steps, self.strategy, self.request.options.eps, whole)])
            if self.edits and masks:  # as many steps as there may be at most
                self.quotas += [1] * self.request.options.max_post_steps
            if self.speculates and masks > 1:  # the verification
                self.quotas += [1]
            return None
        # Without a number of steps: as many as there are masks, so that one token a step is expected.
        plan = bernoulli_plan(uniform(end - start), steps or masks or 1, self.request.options.eps).cpu()
        if not masks:
            self._set_quotas([])
            return None
        is_mask = [token == self.mask for token in self.text[start:end]] if masked is None else masked.tolist()
        planned = list(compress(plan.tolist(), is_mask))
        self._set_quotas([planned.count(step) for step in range(max(planned, default=-1) + 1)])
        return torch.searchsorted(torch.tensor(sorted(set(planned))), plan)

    def _set_quotas(self, quotas: list[int]) -> None:
        transferring = [quota for quota in quotas if quota]
        self.schedule = [0, *accumulate(transferring)]
        self.quotas = transferring if self.leaps else quotas

    @property
    def is_drafting(self) -> bool:
        """Whether the next pass drafts the block, which another one verifies."""
        return self.speculates and self.taken + 1 < len(self.quotas)

    @property
    def holds_draft(self) -> bool:
        """Whether the canvas holds a draft of the block that no pass has verified."""
        return self.speculates and 0 < self.taken < len(self.quotas)

    @property
    def drafts(self) -> int:
        """How many drafts the next pass may feed. The first pass of a block has no logits to make them from."""
        if self.is_first:
            return 0
        levels = map(len, drafts_of(self.strategy, self.draft_steps))
        # Of the block's steps one has been made, and the next one is that of the canvas.
        return max((number for number, level in enumerate(levels, 1) if level < len(self.schedule) - 2), default=0)

    @property
    def wants_pass(self) -> bool:
        """Whether the next step makes a forward pass: a quota of 0 needs none."""
        return not self.is_done and self.step < len(self.quotas) and self.quotas[self.step] > 0

    @property
    def is_prefilling(self) -> bool:
        """Whether the next pass feeds only a piece of the columns before the block, and needs no logits."""
        return self.is_first and self.first_feeds == "not yet final" and self.cell[0] - self.final_length > self.chunk

    @property
    def feeds_whole_block(self) -> bool:
        """Whether the next pass feeds the whole block, or only a sub-block of it whose other keys are in the cache (Fast-dLLM
        v2, arXiv:2509.26328: as long as the sub-block's first position is masked, and at least once in a block)."""
        return not self.uses_block_cache or self.first_is_masked or self.whole_cell != self.cell

    def frame(self) -> Frame:
        """The window of the next forward pass."""
        if self._later_frame is not None and not self.is_first:
            return self._later_frame
        part, (start, end) = self.part, self.cell
        grid = end - start if self.causal_context else self.causal_grid
        if self.is_prefilling:
            stop = self.final_length + self.chunk
            causal = stop if self.causal_context else 0
            return Frame(self.final_length, stop, 0, 0, self.length, self.shown, stop, grid, causal)
        if self.speculates:
            return self._speculative_frame()
        feeds = self.first_feeds if self.is_first else self.others_feed
        if feeds == "canvas":
            begin = 0
        elif feeds == "not yet final":
            begin = min(self.final_length, start)
        else:
            begin = max(start - (0 if self.causal_grid else self.logits_shift), 0)
        stop = end if feeds in ("block", "not yet final") else self.length
        if part.is_seed and feeds == "not yet final":
            begin, stop = min(begin, start - 1), start  # the last clean column has the logits
        elif begin == start and not self.feeds_whole_block:
            begin, stop = part.sub_block
        causal = start if self.causal_context else 0
        frame = Frame(begin, stop, *part.span, self.length, self.shown, start, grid, causal, int(part.is_seed))
        self._later_frame = None if self.is_first or self.uses_block_cache else frame
        return frame

    def _speculative_frame(self) -> Frame:
        """A draft feeds the last token before the block, which sees the block, too, and the block without its last column. A
        verification feeds the same as clean text."""
        part, is_drafting = self.part, self.is_drafting
        start, end = part.span
        before, fed = start - part.is_seed, end - part.is_seed
        begin, stop = (min(self.final_length, before), fed) if self.first_feeds == "not yet final" else (0, self.length)
        seen = (self.length, self.shown, before if is_drafting else start, end - start)
        if is_drafting:
            return Frame(begin, stop, *self.span, *seen, causal=before, speculation=DRAFT)
        is_seed = int(part.is_seed)
        return Frame(begin, stop, *part.span, *seen, fed * is_seed, is_seed, VERIFICATION)

    def note_pass(self, drafts: int = 0) -> None:
        """Go on after the pass that [`Row.frame`] described, with so many drafts."""
        self.passes += 1
        if self.is_prefilling:
            self.final_length += self.chunk
            return
        if self.is_first or self.uses_block_cache or self.speculates:
            part = self.part
            if self.first_feeds == "not yet final":
                # The block's own keys are not final: the first pass of the next block writes them again.
                self.final_length = part.cell[0] - self.is_drafting
            if not part.is_seed and self.feeds_whole_block:
                self.whole_cell = part.cell
        self.is_first = False
        self.taken += 1
        self.most_steps += 1 + (max(map(len, drafts_of(self.strategy, drafts))) if drafts else 0)

    def note_step(self, is_filled: bool | None, first_is_masked: bool, steps: int = 0) -> bool:
        """Go on to the next step, or block.

        Args:
            is_filled: whether the block is known to be done.
            first_is_masked: whether the first of the columns that are decoded is known to be masked.
            steps: with drafts, how many the block has had, if that is known. After a verification, how many tokens it has kept.

        Returns:
            Whether the block is finished.
        """
        self.step += 1
        if self.leaps and steps:
            self.step = self.most_steps = steps
        self.first_is_masked = first_is_masked and self.span[0] == self.part.sub_block[0]
        if self.speculates and self.step == len(self.quotas):
            self._keep(steps)
        elif not is_filled and self.step < len(self.quotas):
            return False
        self._go_to(self.block_index + 1)
        return True

    def _keep(self, number: int) -> None:
        """End a block that speculates with so many of its masks, and append the next one."""
        start, end = self.part.span
        last = [column for column in range(start, end) if self.text[column] == self.mask][number - 1]
        self.blocks[self.block_index :] = [
            self.part._replace(span=(start, last + 1)),
            *self._speculative_blocks(last + 1),
        ]
        if self.first_feeds == "not yet final":
            self.final_length = last  # the keys from there on are a draft's

    def needs_check(self, is_hooked: bool) -> bool:
        """Whether the host must read from the canvas if the block is filled: logits or a hook decide how many tokens a step
        transfers."""
        # A block of which the output shows a part is done as soon as that part is filled.
        is_cut = self.span[1] > self.shown
        may_be_done = self.leaps and self.most_steps >= len(self.quotas)
        if not (self.is_adaptive or is_hooked or is_cut or may_be_done):
            return False
        if not self.taken:  # the block has had no pass yet that could have filled it
            return is_hooked
        return self.taken % self.request.options.check_interval == 0

    @property
    def needs_first(self) -> bool:
        """Whether the host must read from the canvas if the first column of the sub-block is masked: what the next pass feeds
        depends on it."""
        return self.uses_block_cache and self.first_is_masked and self.step + 1 < len(self.quotas)

    def rewind(self, final_length: int) -> None:
        """Make the next pass feed the columns from `final_length` on again: they have changed."""
        if final_length != self.final_length:
            self.final_length, self.is_first = final_length, True

    def end(self, column: int) -> None:
        """Stop decoding. The columns from `column` on belong to the row no longer."""
        self.ends_at, self.is_done, self.has_ended = min(self.ends_at, column), True, True


def spread(number: int, parts: int) -> list[int | None]:
    """A number of steps for each of so many parts, the remainder on the first, at least one each."""
    each, rest = divmod(number, max(parts, 1))
    return [max(each + (index < rest), 1) for index in range(parts)]
