"""The callables that the caller of `diffusion_generate` runs between its steps. They get sequences in the layout of the
library: prompts padded on the left, then the new tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .canvas import Canvas
from .configuration import DiffusionGenerationConfig
from .decoder import Decoder
from .requests import Row
from .sampling import process
from .seats import Seats
from .stopping import StopStrings, end_of


@dataclass
class Hooks:
    """See [`DiffusionGenerationMixin.diffusion_generate`].

    tokens: Dream's `generation_tokens_hook_func`. Called with `None, ..., None` before the first step; logits are `None` as
        well where a step needed no forward pass.
    logits: Dream's `generation_logits_hook_func`.
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

    @property
    def sees_steps(self) -> bool:
        """Whether something looks at the canvas after each step."""
        return self.sees_logits or self.keeps_history or hasattr(self.streamer, "put_draft")

    def checked(self, options: DiffusionGenerationConfig) -> "Hooks":
        """Itself. Raises a `ValueError` where something would read a draft as if it were the text, or change it."""
        if options.self_speculation and self.sees_logits:
            raise ValueError(
                "`self_speculation=True` reads tokens that are only drafted, so that `repetition_penalty`, `logits_processor` "
                "and the hooks would change what autoregressive decoding gives: decode with `block_length=1` instead."
            )
        return self


class Session:
    """Runs the hooks of one call.

    Args:
        prompts: `(batch, prompt)`, as the caller gave them, padding included.
        rows: of the decoder, in the order of the batch; row i stands in slot i.
        seats: of the decoder, which is not kept: it calls the session, and a cycle would hold the buffers of a call until
            garbage is collected.

    Attributes:
        step: the number of steps so far.
        history: the sequences after each step.
        logits: of the last step, after processing; None where it made no forward pass.
        shown: `(batch, prompt + max_new_tokens)`, the column of the canvas behind each position of the sequences; negative
            in the padding.
    """

    def __init__(self, hooks: Hooks, canvas: Canvas, prompts: torch.Tensor, rows: list[Row], seats: Seats):
        self.hooks, self.canvas, self.prompts, self.rows = hooks, canvas, prompts.to(canvas.device), rows
        self.seats = seats
        padding = torch.tensor([prompts.shape[1] - len(row.request.prompt) for row in rows])
        width = prompts.shape[1] + rows[0].request.max_new_tokens
        self.shown = (torch.arange(width) - padding[:, None]).to(canvas.device)
        self.step, self.history = 0, list[torch.Tensor]()
        self.logits: torch.Tensor | None = None
        self.streamed, self.has_begun = 0, False

    def run(self, decoder: Decoder) -> None:
        """Decode every row."""
        if self.hooks.tokens is None:
            self._decode(decoder)
        else:
            self.run_tokens_hook(self.hooks.tokens, None)
            self._decode(decoder, self.rows)
            # The hook may have put masks back where no step was left for them.
            self.hooks.tokens = None
            self._decode(decoder, [row for row in self.rows if not row.has_ended])
        self.pad_after_ends()
        if self.hooks.streamer is not None:
            self.hooks.streamer.end()

    def _decode(self, decoder: Decoder, changed: Sequence[Row] = ()) -> None:
        """`changed`: rows whose masks are no longer those of their request."""
        for row in changed:
            row.begin(self.canvas.tokens[row.slot, : row.length].tolist())
        self.stream_final()
        while decoder.busy:
            self.finish_blocks(decoder.step())

    def sequences(self) -> torch.Tensor:
        """`(batch, prompt + max_new_tokens)`: the prompts as they were given, then the new tokens."""
        number = self.prompts.shape[1]
        shown = self.canvas.tokens[: len(self.rows)].gather(1, self.shown.clamp(min=0))
        shown[:, :number] = torch.where(self.shown[:, :number] < 0, self.prompts, shown[:, :number])
        return shown

    def logprobs(self) -> dict[str, torch.Tensor]:
        """The log-probabilities that [`DiffusionGenerateOutput`] has, in the layout of [`Session.sequences`]; empty where
        none were asked for."""
        asked, tables = self.rows[0].request.logprobs, self.canvas.logprobs
        if asked is None:
            return {}
        rows = torch.arange(len(self.rows), device=self.shown.device)[:, None]
        shown = {name: table[rows, self.shown.clamp(min=0)] for name, table in tables.items()}
        own = shown["own"].masked_fill(self.shown < 0, torch.nan)
        found = {"logprobs": own}
        if asked:
            is_given = own.isnan()[..., None]
            found["top_logprobs"] = shown["top"][..., :asked].masked_fill(is_given, torch.nan)
            found["top_token_ids"] = shown["top_tokens"][..., :asked].long().masked_fill(is_given, -1)
        return found

    def process(self, logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """Run logits hook and processors, between forward pass and selection. `logits`: `(batch, block, vocab)`."""
        if self.hooks.logits is not None:
            logits = self.hooks.logits(self.step, self.sequences(), logits)
        if self.hooks.processors:
            # Processors get rows of different lengths one by one, without padding: a row must not depend on the others.
            if len({row.shown for row in rows}) == 1:
                logits = process(self.hooks.processors, self.sequences(), logits)
            else:
                texts = [self.canvas.text(row)[None] for row in rows]
                each = [process(self.hooks.processors, *one) for one in zip(texts, logits[:, None], strict=True)]
                logits = torch.cat(each)
        self.logits = logits
        return logits

    def after_step(self, has_passed: bool) -> None:
        """Run tokens hook, history and drafts, after each step. `has_passed`: whether the step made a forward pass."""
        if self.hooks.tokens is not None:
            self.run_tokens_hook(self.hooks.tokens, self.step)
        if self.hooks.keeps_history:
            self.history.append(self.sequences())
        if has_passed and hasattr(self.hooks.streamer, "put_draft"):
            end = min(self.rows[0].span[1], self.rows[0].shown)
            self.hooks.streamer.put_draft(self.canvas.tokens[0, self.streamed : end].cpu())
        self.step, self.logits = self.step + 1, None

    def run_tokens_hook(self, hook: Callable, step: int | None) -> None:
        """Write the sequences that the hook returns into the canvas. `step`: None before the first."""
        tokens = self.canvas.tokens[: len(self.rows)]
        before = tokens.clone()
        sequences = hook(step, self.sequences(), self.logits)
        if not isinstance(sequences, torch.Tensor) or sequences.shape != self.shown.shape:
            got = tuple(sequences.shape) if isinstance(sequences, torch.Tensor) else sequences
            raise ValueError(
                f"`generation_tokens_hook_func` must return the sequences, {tuple(self.shown.shape)}, but gave {got}."
            )
        tokens.scatter_(1, torch.where(self.shown < 0, self.canvas.capacity, self.shown), sequences)
        if "own" in self.canvas.logprobs:
            self.canvas.logprobs["own"][: len(tokens)].masked_fill_(tokens != before, torch.nan)
        unchanged = (tokens[:, :-1] == before[:, :-1]).long().cumprod(-1).sum(-1).tolist()
        for row, column in zip(self.rows, unchanged, strict=True):
            if row.first_feeds == "not yet final":
                row.rewind(self.seats.forget(row, column))

    def finish_blocks(self, rows: list[Row]) -> None:
        """End the rows that a stop string or a criterion ends, and stream; `rows` have finished a block."""
        if self.hooks.criteria or self.hooks.stop:
            for row in rows:
                self._end_if_stopped(row)
        if self.rows[0] in rows:
            self.stream_final()

    def _end_if_stopped(self, row: Row) -> None:
        """Ask stop strings and criteria about a row's text up to its first open position. The text has no padding: the
        answer must not depend on the other rows."""
        tokens, hooks = self.canvas.text(row), self.hooks
        final = tokens[(tokens == row.mask).cumsum(0) == 0]
        end = hooks.stop.find(final.tolist(), len(row.request.prompt)) if hooks.stop else None
        if end is None and hooks.criteria:
            block = row.blocks[row.block_index - 1][0]
            if hooks.criteria(final[None], None, new_token_length=block[1] - block[0])[0]:
                end = len(final)
        if end is not None:
            row.end(end)

    def stream_final(self) -> None:
        """Pass to the streamer the tokens that have become final and have no mask before them."""
        if self.hooks.streamer is None:
            return
        row = self.rows[0]
        text = self.canvas.text(row).tolist()
        limit = text.index(row.mask) if row.mask in text else len(text)
        limit = max(min(limit, end_of(row, text)), self.streamed)
        if limit > self.streamed or not self.has_begun:  # streamers take the first tokens that they get for the prompt
            self.hooks.streamer.put(torch.tensor(text[self.streamed : limit]))
        self.streamed, self.has_begun = limit, True

    def pad_after_ends(self) -> None:
        """Replace the tokens behind the end of each row, of which the cache then holds nothing."""
        for row, text in zip(self.rows, self.canvas.tokens[: len(self.rows)].tolist()):
            end = end_of(row, text[: row.shown])
            if end < row.shown:
                self.canvas.tokens[row.slot, end:] = row.request.options.pad_token_id
                if row.request.logprobs is not None:
                    self.canvas.logprobs["own"][row.slot, end:] = torch.nan
                if row.first_feeds == "not yet final":
                    row.final_length = self.seats.forget(row, end)
