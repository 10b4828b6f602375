"""What requests may hold. Null stands for a parameter that was left out; what is not named here is looked at in
`parameters.py`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..generation.requests import MAX_LOGPROBS

MAX_STOPS, MAX_STOP_LENGTH, MAX_MESSAGES = 16, 500, 10_000

TokenIds = Annotated[list[int], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
NumberOfLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Seconds = Annotated[float, Field(gt=0, le=10**9)]


class Strict(BaseModel):
    """Nothing is converted: `"5"` is no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Decoding(Strict):
    """What all requests for completions share. Every option of `DiffusionGenerationConfig` that concerns one request may be
    given as well, by its name or that of an original implementation."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    timeout: Seconds | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    block_length: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    denoising_steps: int | None = Field(None, ge=1)
    remasking_strategy: str | None = None
    confidence_threshold: float | None = Field(None, gt=0, le=1)
    entropy_bound: float | None = Field(None, gt=0)
    factor: float | None = Field(None, gt=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_drafts: bool | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatRequest(Decoding):
    """A request for `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: NumberOfLogprobs | None = None


class CompletionRequest(Decoding):
    """A request for `/v1/completions`. `prompt`: a string, token ids, or several of either."""

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: NumberOfLogprobs | None = None


class InfillRequest(Decoding):
    """A request for `/v1/infill`. `prompt`: a text or token ids with masks, which are filled; in a text, each occurrence of
    `blank` is a mask as well. `max_tokens`, 0 by default, are added behind it."""

    prompt: str | TokenIds
    blank: str | None = Field(None, min_length=1, max_length=100)
    logprobs: NumberOfLogprobs | None = None


class TokenizeRequest(Strict):
    """A request for `/tokenize`: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds


def given(request: BaseModel) -> dict[str, Any]:
    """The parameters of a request that are not null."""
    return {name: value for name, value in request if value is not None} | {
        name: value for name, value in (request.model_extra or {}).items() if value is not None
    }
