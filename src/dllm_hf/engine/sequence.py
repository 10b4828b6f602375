"""`Sequence`: one completion of a request, from the queue to its end."""

from dataclasses import dataclass, field

from ..generation.canvas import Canvas
from ..generation.configuration import as_token_list
from ..generation.requests import Request, Row
from ..generation.stopping import StopStrings, end_of
from .detokenizer import Detokenizer
from .outputs import CompletionOutput, Event, Usage


@dataclass(eq=False)
class Sequence:
    """One completion.

    request_id, index: which of the completions of which request.
    request: what the loop decodes.
    timeout: seconds from its submission to its end at the latest.
    shows_drafts: whether events tell how the canvas looks after each step.
    row: where it stands, once it has been admitted.
    tokens: the new tokens that are final, as far as events have told of them.
    reason: why it has ended, where that is not the end of its canvas or an end of sequence.
    error: what went wrong in one of its steps.
    is_finished: whether its last event has been told.
    """

    request_id: str
    index: int
    request: Request
    timeout: float
    stop: StopStrings | None
    detokenizer: Detokenizer
    shows_drafts: bool = False
    row: Row | None = None
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    error: Exception | None = None
    is_finished: bool = False

    def end(self, reason: str, error: Exception | None = None) -> None:
        """End it wherever it stands."""
        self.reason, self.error = reason, error
        if self.row is not None:
            self.row.end(self.row.shown)

    def draft(self, text: list[int]) -> Event:
        """What stands behind the prompt, final or not. `text`: what the output shows of the row now."""
        new = text[len(self.request.prompt) :]
        return Event(self.request_id, self.index, [], "", draft=self.detokenizer.decode(new, skip_special_tokens=False))

    def settle(self, row: Row, text: list[int]) -> Event | None:
        """Tell what has become final, when the row has finished a block or has ended; None where there is nothing to tell.
        A stop string ends the row. `text`: what the output shows of it now."""
        prompt = len(self.request.prompt)
        final = text[: text.index(row.mask)] if row.mask in text else text
        end = self.stop.find(final, prompt) if self.stop and self.reason is None else None
        if end is not None:
            self.reason = "stop"
            row.end(end)
        new = final[prompt : max(end_of(row, text), prompt)]
        added, self.tokens = new[len(self.tokens) :], new
        return None if not added else Event(self.request_id, self.index, added, self.detokenizer.put(new))

    def finish(self, canvas: Canvas | None) -> Event:
        """The last event. `canvas`: None for what never had a row, or whose canvas cannot be trusted any more."""
        self.is_finished = True
        known, passes, received, filled = len(self.tokens), 0, (0, 0), None
        if self.row is not None and canvas is not None:
            text, received = canvas.text(self.row).tolist(), canvas.counts[self.row.slot].tolist()
            self.settle(self.row, text)
            passes, prompt = self.row.passes, text[: len(self.request.prompt)]
            if self.row.mask in self.request.prompt and self.row.mask not in prompt:
                filled = prompt
        ends = as_token_list(self.request.options.eos_token_id)
        has_end = bool(self.tokens) and self.tokens[-1] in ends
        output = CompletionOutput(
            index=self.index,
            text=self.detokenizer.text(self.tokens),
            token_ids=self.tokens,
            finish_reason=self.reason or ("stop" if has_end else "length"),
            num_forward_passes=passes,
            tokens_per_forward=received[1] / max(received[0], 1),
            filled_prompt_token_ids=filled,
            filled_prompt=None if filled is None else self.detokenizer.decode(filled),
            error=None if self.error is None else f"{type(self.error).__name__}: {self.error}",
        )
        return Event(
            self.request_id,
            self.index,
            self.tokens[known:],
            self.detokenizer.put(self.tokens, is_last=True),
            finish_reason=output.finish_reason,
            usage=Usage(len(self.request.prompt), len(self.tokens), passes),
            output=output,
        )
