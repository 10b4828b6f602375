"""`/v1/chat/completions` and `/v1/completions`."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ..engine import Event
from .answers import Answer, sse, usage_of
from .api import KEEP_ALIVE, Api
from .errors import ApiError
from .parameters import Parameters
from .schema import ChatRequest, CompletionRequest, Decoding


def routes(api: Api) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        parameters = Parameters(body, api.llm, api.settings, ends=api.prompts.turn_ends)
        tokens = await asyncio.to_thread(api.prompts.of_chat, body.messages)
        prompts = [api.prompts.complete(tokens, "messages")]
        return await _complete(api, request, body, parameters, "chat", prompts, "messages", [""])

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        parameters = Parameters(body, api.llm, api.settings)
        given = _several(body.prompt)
        if not given:
            raise ApiError(400, "`prompt` lists nothing.", "prompt")
        if body.echo and body.logprobs is not None:
            raise ApiError(
                400,
                "`logprobs` with `echo` cannot be served: tokens of a prompt were not drawn, and what can be said of a given "
                "text is a bound that takes many forward passes: `model.log_likelihood` and lm-eval's model `dllm` compute it.",
                "logprobs",
                "unsupported_parameter",
            )
        parameters.check_choices(len(given))
        encoded = await asyncio.to_thread(
            lambda: [api.prompts.of_text(each) if isinstance(each, str) else each for each in given]
        )
        prompts = [api.prompts.complete(tokens, "prompt") for tokens in encoded]
        echoes = [""] * len(given)
        if body.echo:
            echoes = [each if isinstance(each, str) else api.prompts.text(each) for each in given]
        return await _complete(api, request, body, parameters, "completion", prompts, "prompt", echoes)

    return router


def _several(prompt: Any) -> list[Any]:
    is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if is_one else prompt


async def _complete(
    api: Api,
    request: Request,
    body: Decoding,
    parameters: Parameters,
    kind: str,
    prompts: list[list[int]],
    name: str,
    echoes: list[str],
) -> Response:
    """Answer a request. `name`: of the parameter that holds the prompts; `echoes`: what stands before each completion."""
    answer, n = Answer(kind, api.settings.name, parameters.echo(api.length(parameters, prompts[0]))), parameters.n
    job = await api.submit(parameters, prompts, name, drafts=bool(body.stream and body.stream_drafts))
    if body.stream:
        return api.stream(job, Chunks(api, answer, body, parameters, prompts, echoes))

    def whole(last: list[Event]) -> dict[str, Any]:
        choices = []
        for number, event in enumerate(last):
            assert event.output is not None
            text = echoes[number // n] + event.output.text
            logprobs = answer.logprobs(event.output.token_ids, event.output.logprobs)
            choices.append(answer.choice(number, text, event.output.finish_reason, logprobs))
        return answer.whole(choices, usage_of(last, n))

    return await api.whole(request, job, whole)


class Chunks:
    """Makes the chunks of one stream. The texts of a completion's chunks are, one behind the other, its text."""

    def __init__(
        self,
        api: Api,
        answer: Answer,
        body: Decoding,
        parameters: Parameters,
        prompts: list[list[int]],
        echoes: list[str],
    ):
        self.api, self.answer, self.parameters, self.n = api, answer, parameters, parameters.n
        self.prompts, self.echoes = prompts, echoes
        options = body.stream_options
        self.tells_usage = bool(options and options.include_usage)
        self.counts = bool(options and options.continuous_usage_stats)
        self.drafts = bool(body.stream_drafts)
        self.tokens: dict[int, int] = {}  # by completion that has begun
        self.offsets: dict[int, int] = {}  # by completion, where the text of its next token begins

    async def __call__(self, events: AsyncIterator[tuple[int, Event] | None]) -> AsyncIterator[bytes]:
        last: dict[int, Event] = {}
        async for each in events:
            if each is None:
                yield KEEP_ALIVE
                continue
            number, event = each
            if number not in self.tokens:
                self.tokens[number] = 0
                if self.answer.kind == "chat":
                    yield self._chunk(number, None)
                elif echo := self.echoes[number // self.n]:
                    yield self._chunk(number, echo)
                if self.drafts:
                    length = self.api.length(self.parameters, self.prompts[number // self.n])
                    yield self._chunk(number, "", draft={"tokens": [None] * length})
            self.tokens[number] += len(event.token_ids)
            if event.draft_token_ids is not None:
                tokens = event.draft_token_ids[len(self.prompts[number // self.n]) :]
                yield self._chunk(number, "", draft={"tokens": self.api.prompts.pieces(tokens)})
            if event.text or event.logprobs:  # the text of a token may be held back
                yield self._chunk(number, event.text, logprobs=self._logprobs(number, event))
            if event.output is not None:
                last[number] = event
                more = {"draft": {"tokens": self.api.prompts.pieces(event.output.token_ids)}} if self.drafts else {}
                yield self._chunk(number, "", event.finish_reason, **more)
        if self.tells_usage:
            yield sse(self.answer.last_chunk(usage_of((last[number] for number in sorted(last)), self.n)))

    def _logprobs(self, number: int, event: Event) -> dict[str, Any] | None:
        found = self.answer.logprobs(event.token_ids, event.logprobs, self.offsets.get(number, 0))
        if found and found.get("tokens"):
            self.offsets[number] = found["text_offset"][-1] + len(found["tokens"][-1])
        return found

    def _chunk(self, number: int, text: str | None, reason: str | None = None, **more: Any) -> bytes:
        if self.counts:
            prompt, completion = len(self.prompts[number // self.n]), self.tokens[number]
            total = prompt + completion
            more["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
        elif self.tells_usage:
            more["usage"] = None
        return sse(self.answer.chunk(number, text, reason, **more))
