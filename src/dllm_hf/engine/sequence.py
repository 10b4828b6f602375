"""`Sequence`: one completion of a request, from the queue to its end."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..generation.configuration import as_token_list
from ..generation.requests import Request, Row
from ..generation.stopping import StopStrings, end_of
from .detokenizer import Detokenizer
from .grammar import Grammar
from .outputs import CompletionOutput, Event, Logprob, Logprobs, Usage
from .reading import Distribution
from .sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One completion.

    request_id, index: which of the completions of which request.
    request: what the loop decodes.
    params: what was asked for.
    timeout: seconds from its submission to its end at the latest.
    spell: the text of one token; None without a tokenizer.
    grammar: what its text must be, where it is constrained.
    shows_texts, shows_drafts: whether events tell tokens and text as they become final, or the last one alone does; and how
        the canvas looks after each step.
    columns: that it takes in the arena.
    passed_over: how often a later one was admitted before it.
    row: where it stands, once it has been admitted.
    text: the canvas as far as the host knows it: masks where a block has not been finished.
    logprobs: of the positions of `text`, where they were asked for; None for those that the host does not know, and given ones.
    final: the column up to which nothing of it is open.
    tokens: the new tokens that events have told of.
    reason: why it has ended, where that is not the end of its canvas or an end of sequence.
    error: what went wrong in one of its steps.
    is_over: whether what has been told of it holds its end, before the end of its canvas.
    is_finished: whether its last event has been told.
    """

    request_id: str
    index: int
    request: Request
    params: SamplingParams
    timeout: float
    stop: StopStrings | None
    detokenizer: Detokenizer
    spell: Callable[[int], str | None]
    grammar: Grammar | None = None
    shows_texts: bool = False
    shows_drafts: bool = False
    columns: int = 0
    passed_over: int = 0
    row: Row | None = None
    text: list[int] = field(default_factory=list)
    logprobs: list[Logprobs | None] = field(default_factory=list)
    final: int = 0
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    is_over: bool = False
    is_finished: bool = False

    def admit(self, row: Row) -> None:
        self.row, self.text, self.final = row, row.text[: row.shown], self.request.given
        if self.request.logprobs is not None:
            self.logprobs = [None] * row.shown

    def end(self, reason: str, error: Exception | None = None) -> None:
        """End it wherever it stands."""
        # As text: a traceback would hold whoever waits for this, and the engine.
        self.reason, self.error = reason, None if error is None else f"{type(error).__name__}: {error}"
        if self.row is not None:
            self.row.end(self.row.shown)

    def draft(self, text: list[int]) -> Event:
        """What stands behind the prompt, final or not. `text`: what the output shows of the row now."""
        new = text[len(self.request.prompt) :]
        draft = self.detokenizer.decode(new, skip_special_tokens=False)
        return Event(self.request_id, self.index, [], "", draft=draft, draft_token_ids=text)

    def settle(
        self, start: int, block: list[int], distributions: list[Distribution] | None, is_last: bool
    ) -> Event | None:
        """Tell what has become final with a block that begins at column `start`; None where there is nothing to tell. An end
        of sequence or a stop string ends the row. `is_last`: whether nothing of the row is left to decode."""
        row, prompt = self.row, len(self.request.prompt)
        assert row is not None
        self.text[start : start + len(block)] = block[: row.shown - start]
        for column, each in enumerate(distributions or (), start):
            if column < row.shown and row.text[column] == row.mask:
                self.logprobs[column] = self._logprobs_of(self.text[column], *each)
        try:
            self.final = self.text.index(row.mask, self.final, row.shown)
        except ValueError:  # no mask is left
            self.final = row.shown
        ends = as_token_list(self.request.options.eos_token_id)
        if ends and any(token in ends for token in self.text[max(start, prompt) : start + len(block)]):
            self.is_over = True
            row.end(row.shown)
        end = self.stop.find(self.text[: self.final], prompt) if self.stop else None
        if end is not None:
            self.reason, self.detokenizer.is_stopped, self.is_over = self.reason or "stop", True, True
            row.end(end)
        # No end of sequence stands before the last block of a row that goes on.
        limit = end_of(row, self.text) if is_last or row.has_ended else self.final
        added = self.text[prompt + len(self.tokens) : limit]
        self.tokens += added
        if not (added and self.shows_texts):
            return None
        text, end = self.detokenizer.put(self.tokens), prompt + len(self.tokens)
        return Event(self.request_id, self.index, added, text, logprobs=self._logprobs(end - len(added), end))

    def _logprobs(self, start: int, end: int) -> list[Logprobs] | None:
        """Those of new tokens, in columns of the text."""
        if self.request.logprobs is None:
            return None
        return [each for each in self.logprobs[start:end] if each is not None]

    def _logprobs_of(self, token: int, own: float, top: list[tuple[int, float]]) -> Logprobs:
        found = {token: Logprob(own, None, self.spell(token))}
        return found | {each: Logprob(value, rank, self.spell(each)) for rank, (each, value) in enumerate(top, 1)}

    def finish(self, passes: int = 0, useful: int = 0, transferred: int = 0) -> Event:
        """The last event, which tells nothing new of the tokens. `passes`: forward passes until then; `useful`: those that
        gave the row a token; `transferred`: how many it got."""
        row, prompt = self.row, self.request.prompt
        mask, filled = self.request.options.mask_token_id, None
        if row is not None and self.request.given < len(prompt) and mask not in self.text[: len(prompt)]:
            filled = self.text[: len(prompt)]
        has_end = bool(self.tokens) and self.tokens[-1] in as_token_list(self.request.options.eos_token_id)
        text, filled_text = "", None
        try:
            text = self.detokenizer.put(self.tokens, is_last=True)
            filled_text = None if filled is None else self.detokenizer.decode(filled)
        except Exception as error:  # a tokenizer that does not know a token of the model
            self.end("error", error)
        logprobs = self._logprobs(len(prompt), len(prompt) + len(self.tokens))
        output = CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=self.tokens,
            finish_reason=self.reason or ("stop" if has_end else "length"),
            num_forward_passes=passes,
            tokens_per_forward=transferred / max(useful, 1),
            filled_prompt_token_ids=filled,
            filled_prompt=filled_text,
            error=self.error,
            logprobs=logprobs,
            cumulative_logprob=None
            if logprobs is None
            else sum(each[token].logprob for token, each in zip(self.tokens, logprobs, strict=True)),
            filled_prompt_logprobs=None if filled is None or logprobs is None else self.logprobs[: len(prompt)],
        )
        usage = Usage(len(prompt), len(self.tokens), passes, useful)
        self.is_finished = True
        return Event(
            self.request_id, self.index, [], text, finish_reason=output.finish_reason, usage=usage, output=output
        )
