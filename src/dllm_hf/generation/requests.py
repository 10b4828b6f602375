"""What is asked for a row, and where the row stands: its blocks, its step, what its next forward pass feeds. No tensors."""

from dataclasses import dataclass

import torch

from .configuration import DiffusionGenerationConfig
from .remasking import STRATEGIES, Strategy, bernoulli_plan, transfer_quotas
from .window import Frame

# What the first pass of a block feeds, and what its other passes feed.
POLICIES = {
    # Every pass feeds and sees the whole canvas. Exact.
    "none": ("canvas", "canvas"),
    # Fast-dLLM, arXiv:2505.22618, section 3.2: what stands before the block is as old as the block's first pass ...
    "prefix": ("canvas", "from the block"),
    # ... and what stands after it as well.
    "dual": ("canvas", "block"),
    # Where blocks see earlier ones alone: with a block's first pass goes what is final and not yet in the cache, which is
    # the prompt before the first block, then each finished block. Exact.
    "block": ("not yet final", "block"),
}


@dataclass(frozen=True)
class Request:
    """What a caller asks for one row.

    prompt: token ids; masks in it are positions to fill.
    max_new_tokens: masks to append.
    options: resolved: special tokens, `remasking_strategy`, `cache_policy` and `block_length` are set (`block_length` None
        puts all masks into one block).
    generator: draws for this row; None is PyTorch's own. Rows that share one share their draws.
    """

    prompt: list[int]
    max_new_tokens: int
    options: DiffusionGenerationConfig
    generator: torch.Generator | None = None

    def canvas(self, block_grid: str) -> list[int]:
        """Prompt and positions to fill. With the grid at 0 the last block is filled up with masks where it has any."""
        mask, size = self.options.mask_token_id, self.options.block_length or 1
        text = [*self.prompt, *[mask] * self.max_new_tokens]
        if block_grid == "zero" and mask in text[-(len(text) % size or size) :]:
            text += [mask] * (-len(text) % size)
        return text


class Row:
    """Where a row stands. Position = column; its canvas is the prompt and the positions to fill.

    Args:
        slot: the row of the buffers that it has.
        block_grid: `"prompt"` aligns the blocks to the prompt's end, `"zero"` to position 0; the last one is then filled up
            with masks, which the output does not show.
        sees_earlier_blocks: whether a block sees earlier ones alone.
        logits_shift: the logits of a position stand that many columns before it.

    Attributes:
        text: the canvas as it was in the beginning.
        shown, length: the columns that the output shows, and all.
        final_length: the column up to which the cache holds what is final (policy `block`).
        passes: forward passes that this row took part in.
        is_done: whether nothing is left to decode. has_ended: whether that is so before all blocks were decoded.
    """

    def __init__(self, request: Request, slot: int, block_grid: str, sees_earlier_blocks: bool, logits_shift: int):
        options = request.options
        self.request, self.slot, self.grid, self.shift = request, slot, block_grid, logits_shift
        self.block_length, self.mask = options.block_length, options.mask_token_id
        self.strategy: Strategy = STRATEGIES[options.remasking_strategy]
        self.first_feeds, self.others_feed = POLICIES[options.cache_policy]
        self.sees = self.block_length if sees_earlier_blocks else 0
        size = self.block_length or 1
        # A piece of a prompt must not end inside a block, whose tokens see each other.
        self.chunk = max(options.prefill_chunk_size // size, 1) * size
        self.shown = len(request.prompt) + request.max_new_tokens
        self.text = request.canvas(block_grid)
        self.length, self.final_length, self.passes = len(self.text), 0, 0
        self.ends_at, self.has_ended = self.shown, False
        self.begin(self.text)

    def begin(self, text: list[int]) -> None:
        """Start to decode the masks of `text`, the row's canvas as it is now."""
        cells = self._cells(text)
        masks = [text[start:end].count(self.mask) for start, end in cells]
        steps: list[int | None] = [self.request.options.denoising_steps] * len(cells)
        if self.request.options.steps is not None:  # spread over the blocks, the remainder on the first
            each, rest = divmod(self.request.options.steps, max(len(cells), 1))
            steps = [max(each + (index < rest), 1) for index in range(len(cells))]
        self.blocks = list(zip(cells, masks, steps, strict=True))
        self.block_index, self.is_open, self.is_done = 0, False, not cells

    def _cells(self, text: list[int]) -> list[tuple[int, int]]:
        """The grid's cells that hold masks among the columns that are shown, as (start, end)."""
        if self.mask not in text[: self.shown]:
            return []
        first, length = text.index(self.mask), self.block_length
        if length is None:
            return [(first, len(text))]
        anchor = 0 if self.grid == "zero" else len(self.request.prompt) % length
        # The cell that the first mask falls into; the one before the anchor is cut short by the canvas' beginning.
        start = anchor + (first - anchor) // length * length
        cells = [(max(cell, 0), min(cell + length, len(text))) for cell in range(start, len(text), length)]
        return [cell for cell in cells if self.mask in text[cell[0] : min(cell[1], self.shown)]]

    # --- the block that is being decoded

    @property
    def span(self) -> tuple[int, int]:
        return self.blocks[self.block_index][0]

    @property
    def is_cut(self) -> bool:
        """Whether the output does not show all of the block, which is then done as soon as what is shown of it is."""
        return self.span[1] > self.shown

    def open_block(self, uniform, masked: torch.Tensor | None = None) -> torch.Tensor | None:
        """Make the quotas of a block before its first step.

        Args:
            uniform: `width -> (width,)`, uniform numbers of the row's generator.
            masked: `(width,)` bool, the block's masks where they are not those of [`Row.text`] any more.

        Returns:
            `(width,)` on the CPU, the step at which each position may be transferred, where that was drawn.
        """
        (start, end), masks, steps = self.blocks[self.block_index]
        self.is_open, self.is_first, self.step, self.taken = True, True, 0, 0
        if masked is not None:  # of columns that nobody sees alone, nothing is to be decoded
            masks = int(masked.sum()) if masked[: self.shown - start].any() else 0
        if self.strategy.selection != "bernoulli":
            self.quotas = transfer_quotas(masks, steps, self.strategy, self.request.options.eps)
            return None
        # Without a number of steps: as many as there are masks, so that one token a step is expected.
        plan = bernoulli_plan(uniform(end - start), steps or masks or 1, self.request.options.eps)
        if not masks:
            self.quotas = []
            return None
        at = [token == self.mask for token in self.text[start:end]] if masked is None else masked.tolist()
        planned = [step for step, is_mask in zip(plan.tolist(), at, strict=True) if is_mask]
        self.quotas = [planned.count(step) for step in range(max(planned, default=-1) + 1)]
        return plan

    @property
    def wants_pass(self) -> bool:
        """Whether the next step makes a forward pass: a quota of 0 needs none."""
        return not self.is_done and self.step < len(self.quotas) and self.quotas[self.step] > 0

    @property
    def is_prefilling(self) -> bool:
        """Whether the next pass computes a piece of what stands before the block, whose logits nobody needs."""
        return self.is_first and self.first_feeds == "not yet final" and self.span[0] - self.final_length > self.chunk

    def frame(self) -> Frame:
        """What the next forward pass feeds."""
        start, end = self.span
        if self.is_prefilling:
            stop = self.final_length + self.chunk
            return Frame(self.final_length, stop, 0, 0, self.length, self.shown, stop, self.sees)
        feeds = self.first_feeds if self.is_first else self.others_feed
        before = 0 if self.sees else self.shift
        begin = {"canvas": 0, "not yet final": min(self.final_length, start)}.get(feeds, max(start - before, 0))
        stop = end if feeds in ("block", "not yet final") else self.length
        return Frame(begin, stop, start, end, self.length, self.shown, start, self.sees)

    def note_pass(self) -> None:
        """Take note of the pass that [`Row.frame`] described."""
        self.passes += 1
        if self.is_prefilling:
            self.final_length += self.chunk
            return
        if self.first_feeds == "not yet final":
            # The block's own keys are not final: the next block's first pass writes them again.
            self.final_length = self.span[0]
        self.is_first = False
        self.taken += 1

    def note_step(self, is_filled: bool | None) -> bool:
        """Go on to the next step, or block. `is_filled`: whether the block has no mask left, as far as that is known.

        Returns:
            Whether the block is finished.
        """
        self.step += 1
        if not is_filled and self.step < len(self.quotas):
            return False
        self.block_index, self.is_open = self.block_index + 1, False
        self.is_done = self.block_index == len(self.blocks)
        return True

    def needs_look(self, is_hooked: bool) -> bool:
        """Whether only the canvas knows if the block is filled: where logits or a hook decide how much is transferred."""
        if not (self.strategy.is_adaptive or is_hooked or self.is_cut):
            return False
        if not self.taken:  # the block has had no pass yet that could have filled it
            return is_hooked
        return self.taken % self.request.options.check_interval == 0

    def rewind(self, final_length: int) -> None:
        """What stands behind `final_length` has changed: the next pass feeds it again."""
        if final_length != self.final_length:
            self.final_length, self.is_first = final_length, True

    def end(self, column: int) -> None:
        """Nothing behind `column` belongs to the row any more, and nothing is decoded."""
        self.ends_at, self.is_done, self.has_ended = min(self.ends_at, column), True, True
