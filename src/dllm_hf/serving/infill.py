"""`/v1/infill`: texts with masks in them."""

import asyncio
from collections.abc import AsyncIterator
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request, Response

from ..engine import Event
from .answers import Answer, sse, usage_of
from .api import KEEP_ALIVE, Api
from .errors import ApiError
from .parameters import Parameters
from .schema import InfillRequest


def routes(api: Api) -> APIRouter:
    router = APIRouter(tags=["Diffusion"])

    @router.post("/v1/infill")
    async def infill(request: Request, body: InfillRequest) -> Response:
        parameters = Parameters(body, api.llm, api.settings, max_tokens=0)
        if isinstance(body.prompt, str):
            prompt = await asyncio.to_thread(api.prompts.of_blanks, body.prompt, body.blank)
        else:
            prompt = body.prompt
        if api.prompts.mask not in prompt:
            raise ApiError(
                400, f"`prompt` holds no mask, token {api.prompts.mask}: there is nothing to fill.", "prompt"
            )
        answer = Answer("infill", api.settings.name, parameters.echo(api.length(parameters, prompt)))
        job = await api.submit(parameters, [prompt], "prompt", drafts=bool(body.stream and body.stream_drafts))
        if not body.stream:
            return await api.whole(
                request,
                job,
                lambda last: answer.whole(
                    [_choice(api, answer, prompt, event) for event in last], usage_of(last, parameters.n)
                ),
            )

        async def chunks(events: AsyncIterator[tuple[int, Event] | None]) -> AsyncIterator[bytes]:
            last: dict[int, Event] = {}
            begun: set[int] = set()
            async for each in events:
                if each is None:
                    yield KEEP_ALIVE
                    continue
                number, event = each
                if body.stream_drafts and number not in begun:
                    begun.add(number)
                    draft = {"tokens": api.prompts.pieces(prompt) + [None] * api.length(parameters, prompt)}
                    yield sse(answer.chunk(number, "", draft=draft))
                if event.draft_token_ids is not None:
                    draft = {"tokens": api.prompts.pieces(event.draft_token_ids)}
                    yield sse(answer.chunk(number, "", draft=draft))
                if event.output is not None:
                    last[number] = event
                    choice = _choice(api, answer, prompt, event)
                    tokens = [*(event.output.filled_prompt_token_ids or []), *event.output.token_ids]
                    more = {"draft": {"tokens": api.prompts.pieces(tokens)}} if body.stream_drafts else {}
                    yield sse(answer.chunk_of(choice, **more))
            if body.stream_options and body.stream_options.include_usage:
                yield sse(answer.last_chunk(usage_of((last[number] for number in sorted(last)), parameters.n)))

        return api.stream(job, chunks)

    return router


def _choice(api: Api, answer: Answer, prompt: list[int], event: Event) -> dict[str, Any]:
    output = event.output
    assert output is not None
    filled = output.filled_prompt_token_ids
    if filled is None:
        raise ApiError(408, "The masks were not filled within the timeout.", "timeout", "timeout")
    fills = []
    for is_mask, group in groupby(range(len(prompt)), lambda index: prompt[index] == api.prompts.mask):
        if is_mask:
            run = list(group)
            tokens = filled[run[0] : run[-1] + 1]
            found = [each for each in (output.filled_prompt_logprobs or ())[run[0] : run[-1] + 1] if each is not None]
            logprobs = answer.logprobs(tokens, None if output.logprobs is None else found)
            text = api.prompts.text(tokens)
            fills.append({"start": run[0], "token_ids": tokens, "text": text, "logprobs": logprobs})
    return {
        "index": output.index,
        "text": (output.filled_prompt or "") + output.text,
        "fills": fills,
        "logprobs": answer.logprobs(output.token_ids, output.logprobs),
        "finish_reason": output.finish_reason,
    }
