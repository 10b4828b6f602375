"""What comes back: events while requests run, and outputs named as in vLLM."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Usage:
    """What one completion took.

    num_forward_passes: those that its row took part in, the pieces of its prompt included.
    num_denoising_steps: those among them that gave the row a token.
    """

    prompt_tokens: int
    completion_tokens: int
    num_forward_passes: int
    num_denoising_steps: int


@dataclass(frozen=True)
class Load:
    """How much of an engine is in use.

    running, waiting: completions with and without a slot.
    cache: the part of the columns that running completions hold; of the slots, where the model has no columns.
    num_forward_passes: of the engine since it was made.
    """

    running: int
    waiting: int
    cache: float
    num_forward_passes: int


@dataclass(frozen=True)
class Logprob:
    """A token that stood to choice at a position, at the step that made the position final.

    logprob: in the distribution that the model gave there, see `logprobs` of [`SamplingParams`].
    rank: 1 for the most probable; None where it is not among those that were asked for.
    decoded_token: its text by itself; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Of one position, by token: the token that it got first, then the most probable ones, falling.
Logprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One completion of a request.

    index: which of the request's `n` completions.
    text: of `token_ids`, without special tokens and up to the stop string, if one ended it.
    token_ids: the new tokens, the end of sequence included where there is one, without padding.
    finish_reason: `"stop"` (an end of sequence or a stop string), `"length"`, `"abort"`, `"timeout"` or `"error"`.
    num_forward_passes: see [`Usage`].
    tokens_per_forward: tokens received, divided by the forward passes that gave the row any.
    filled_prompt_token_ids, filled_prompt: the prompt with its masks filled; None where it had none.
    error: what went wrong, where `finish_reason` is `"error"`.
    logprobs: for each of `token_ids`, where the request asked for them. cumulative_logprob: the sum of those of `token_ids`,
        which is not the likelihood of the text: each was read beside other masks.
    filled_prompt_logprobs: for each of `filled_prompt_token_ids`, None for tokens that were given.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    num_forward_passes: int
    tokens_per_forward: float
    filled_prompt_token_ids: list[int] | None = None
    filled_prompt: str | None = None
    error: str | None = None
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None
    filled_prompt_logprobs: list[Logprobs | None] | None = None


@dataclass
class RequestOutput:
    """A request that has finished: its prompt and its `n` completions, in their order."""

    request_id: str
    prompt_token_ids: list[int]
    prompt: str | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(output.finish_reason != "abort" for output in self.outputs)


@dataclass(frozen=True)
class Event:
    """What has happened to one completion of a request.

    token_ids, text: what has become final since the last event, in order from left to right; of an infilling request what
        stands after the prompt only. The texts of all events together are the completion's text.
    logprobs: of `token_ids`, where the request asked for them.
    draft: the text of the whole canvas behind the prompt as it is now, masks included, where drafts were asked for.
    draft_token_ids: the whole canvas, the prompt included, where drafts were asked for.
    output: the whole completion, once it has finished; `finish_reason` and `usage` are set then as well.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    draft: str | None = None
    draft_token_ids: list[int] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    output: CompletionOutput | None = None
    logprobs: list[Logprobs] | None = None
