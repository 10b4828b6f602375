"""What the caller runs between the steps of `diffusion_generate`, in the layout of the library: prompts padded on the left,
then the new tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .canvas import Canvas
from .requests import Row
from .sampling import process
from .stopping import StopStrings, end_of


@dataclass
class Hooks:
    """tokens: `(step, sequences, logits) -> sequences`, Dream's `generation_tokens_hook_func`. Called with `None, ..., None`
        before the first step; logits are `None` as well where a step needed no forward pass.
    logits: `(step, sequences, logits) -> logits`, Dream's `generation_logits_hook_func`; logits are those of the block,
        `(batch, block, vocab)`.
    processors: see `(rows, vocab)`, a row for each position of the block.
    criteria: asked after each block; rows for which they hold end there.
    stop: looked for after each block.
    streamer: of the library's; for a batch of one.
    keeps_history: whether the sequences after each step are kept.
    """

    tokens: Callable | None = None
    logits: Callable | None = None
    processors: LogitsProcessorList | None = None
    criteria: StoppingCriteriaList | None = None
    stop: StopStrings | None = None
    streamer: Any = None
    keeps_history: bool = False

    @property
    def sees_logits(self) -> bool:
        return bool(self.tokens or self.logits or self.processors)


class Session:
    """Runs the hooks of one call.

    Args:
        prompts: `(batch, prompt)`, as the caller gave them, padding included.
        rows: of the decoder, in the order of the batch.
        forget: `(row, column) -> final length`, see [`backend.Backend`].

    Attributes:
        step: how many steps there have been.
        history: the sequences after each step.
    """

    def __init__(
        self, hooks: Hooks, canvas: Canvas, prompts: torch.Tensor, rows: list[Row], forget: Callable[[Row, int], int]
    ):
        self.hooks, self.canvas, self.prompts, self.rows = hooks, canvas, prompts.to(canvas.device), rows
        self.forget = forget
        padding = torch.tensor([prompts.shape[1] - len(row.request.prompt) for row in rows])
        width = prompts.shape[1] + rows[0].request.max_new_tokens
        # The column of the canvas that each column of the sequences shows; negative in the padding.
        self.shown = (torch.arange(width) - padding[:, None]).to(canvas.device)
        self.step, self.history, self.logits = 0, [], None
        self.streamed, self.has_begun = 0, False

    def sequences(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, prompt + max_new_tokens)`: the prompts as they were given, then the new tokens."""
        tokens = self.canvas.tokens if tokens is None else tokens
        number = self.prompts.shape[1]
        shown = tokens[: len(self.rows)].gather(1, self.shown.clamp(min=0))
        shown[:, :number] = torch.where(self.shown[:, :number] < 0, self.prompts, shown[:, :number])
        return shown

    def process(self, logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """Between forward pass and selection. `logits`: `(batch, block, vocab)`."""
        if self.hooks.logits is not None:
            logits = self.hooks.logits(self.step, self.sequences(), logits)
        if self.hooks.processors:
            # Rows of different lengths go one by one, without padding: a row must not depend on its neighbours' lengths.
            if len({row.shown for row in rows}) == 1:
                logits = process(self.hooks.processors, self.sequences(), logits)
            else:
                texts = [self.canvas.text(row)[None] for row in rows]
                each = [process(self.hooks.processors, *one) for one in zip(texts, logits[:, None], strict=True)]
                logits = torch.cat(each)
        self.logits = logits
        return logits

    def after_step(self, has_passed: bool) -> None:
        """When a step has transferred its tokens, or made no forward pass."""
        if self.hooks.tokens is not None:
            self.run_tokens_hook(self.step)
        if self.hooks.keeps_history:
            self.history.append(self.sequences())
        if has_passed and hasattr(self.hooks.streamer, "put_draft"):
            end = min(self.rows[0].span[1], self.rows[0].shown)
            self.hooks.streamer.put_draft(self.canvas.tokens[0, self.streamed : end].cpu())
        self.step, self.logits = self.step + 1, None

    def run_tokens_hook(self, step: int | None) -> None:
        tokens = self.canvas.tokens[: len(self.rows)]
        before = tokens.clone()
        sequences = self.hooks.tokens(step, self.sequences(), self.logits)
        if not isinstance(sequences, torch.Tensor) or sequences.shape != self.shown.shape:
            got = tuple(sequences.shape) if isinstance(sequences, torch.Tensor) else sequences
            raise ValueError(
                f"`generation_tokens_hook_func` must return the sequences, {tuple(self.shown.shape)}, but gave {got}."
            )
        tokens.scatter_(1, torch.where(self.shown < 0, self.canvas.capacity, self.shown), sequences)
        unchanged = (tokens[:, :-1] == before[:, :-1]).long().cumprod(-1).sum(-1).tolist()
        for row, column in zip(self.rows, unchanged, strict=True):
            if row.first_feeds == "not yet final":
                row.rewind(self.forget(row, column))

    def finish_blocks(self, rows: list[Row]) -> None:
        """When rows have finished a block: end those that a stop string or a criterion ends."""
        if self.hooks.criteria or self.hooks.stop:
            for row in rows:
                self._ask(row)
        if self.rows[0] in rows:
            self.confirm()

    def _ask(self, row: Row) -> None:
        """Ask criteria and stop strings about a row, up to its first position that is still open and without padding: about
        what it would be asked about alone."""
        tokens, hooks = self.canvas.text(row), self.hooks
        final = tokens[(tokens == row.mask).cumsum(0) == 0]
        end = hooks.stop.find(final.tolist(), len(row.request.prompt)) if hooks.stop else None
        if end is None and hooks.criteria:
            block = row.blocks[row.block_index - 1][0]
            if hooks.criteria(final[None], None, new_token_length=block[1] - block[0])[0]:
                end = len(final)
        if end is not None:
            row.end(end)

    def confirm(self) -> None:
        """Pass to the streamer what has become final, from left to right, as far as no mask stands before it."""
        if self.hooks.streamer is None:
            return
        row = self.rows[0]
        text = self.canvas.text(row).tolist()
        limit = text.index(row.mask) if row.mask in text else len(text)
        limit = max(min(limit, end_of(row, text)), self.streamed)
        if limit > self.streamed or not self.has_begun:  # streamers take the first that they get for the prompt
            self.hooks.streamer.put(torch.tensor(text[self.streamed : limit]))
        self.streamed, self.has_begun = limit, True

    def pad_after_ends(self) -> None:
        """Replace what stands behind the end of each row. A cache must not be taken to hold what has only now been put
        there."""
        tokens = self.canvas.tokens[: len(self.rows)]
        texts = [text[: row.shown] for row, text in zip(self.rows, tokens.tolist(), strict=True)]
        ends = [end_of(row, text) for row, text in zip(self.rows, texts, strict=True)]
        if all(end == row.shown for end, row in zip(ends, self.rows, strict=True)):
            return
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        behind = columns >= torch.tensor(ends, device=tokens.device)[:, None]
        tokens.masked_fill_(behind, self.rows[0].request.options.pad_token_id)
        for row, end in zip(self.rows, ends, strict=True):
            if row.first_feeds == "not yet final" and end < row.shown:
                row.final_length = self.forget(row, end)
