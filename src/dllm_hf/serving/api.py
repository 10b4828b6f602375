"""`Api`: what the endpoints share, and how a request for completions becomes an answer, whole or as a stream."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine import LLM, Event, QueueFullError, SamplingParams
from ..generation.inputs import DEFAULT_MAX_NEW_TOKENS
from .answers import sse
from .engine_thread import EngineThread, Job
from .errors import ApiError
from .metrics import Metrics
from .parameters import Parameters
from .prompts import Prompts
from .schema import Decoding
from .settings import Settings

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": nothing has become final for a while\n\n"
CLIENT_HAS_GONE = 499  # nginx's; nobody sees it
# Beyond the time that decoding may take: to a client that reads slowly.
SENDING_SECONDS = 60.0

# Makes the chunks of a stream of what happens to its completions.
Chunks = Callable[[AsyncIterator[tuple[int, Event] | None]], AsyncIterator[bytes]]


class Api:
    """One model behind all endpoints."""

    def __init__(self, llm: LLM, settings: Settings):
        self.llm, self.settings = llm, settings
        self.prompts, self.metrics = Prompts(llm), Metrics(settings.name)
        self.engine = EngineThread(llm, self.metrics)
        try:
            Parameters(Decoding.model_validate({}), llm, settings)
        except ApiError as error:  # the model's own options: every request would be refused
            raise ValueError(error.message) from error

    async def submit(self, parameters: Parameters, prompts: list[list[int]], name: str, drafts: bool) -> Job:
        """Put prompts into the queue. `name`: of the parameter that holds them."""
        parameters.check_choices(len(prompts))
        requests = [(prompt, self._sampling(parameters, prompt)) for prompt in prompts]
        if self.settings.log_prompts:
            logger.info("prompts %s", [self.prompts.text(prompt) for prompt in prompts])
        try:
            return await self.engine.submit(requests, drafts)
        except (ValueError, QueueFullError) as error:
            raise parameters.refusal(error, name) from error

    def _sampling(self, parameters: Parameters, prompt: list[int]) -> SamplingParams:
        sampling = parameters.sampling
        return replace(sampling, options={**sampling.options, "max_new_tokens": self.length(parameters, prompt)})

    def length(self, parameters: Parameters, prompt: list[int]) -> int:
        """The new tokens of a completion."""
        if parameters.max_tokens is not None:
            return parameters.max_tokens
        options = parameters.effective
        wanted = DEFAULT_MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
        return self.prompts.default_length(prompt, wanted, options.block_length)

    async def whole(self, request: Request, job: Job, answer: Callable[[list[Event]], dict[str, Any]]) -> Response:
        """The answer to a request that is not streamed, made of the last event of each completion."""

        async def work() -> dict[str, Any]:
            last: dict[int, Event] = {}
            async for each in job.events():
                if each is not None and each[1].output is not None:
                    last[each[0]] = each[1]
            return answer([last[number] for number in sorted(last)])

        try:
            body = await _unless_disconnected(request.receive, work())
        finally:
            job.close()
        return Response(status_code=CLIENT_HAS_GONE) if body is None else JSONResponse(body)

    def stream(self, job: Job, chunks: Chunks) -> Response:
        return EventStream(job, self._bytes(job, chunks), self.settings.request_timeout + SENDING_SECONDS)

    async def _bytes(self, job: Job, chunks: Chunks) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks(job.events()):
                yield chunk
        except ApiError as error:
            yield sse(error.body)
        except Exception:
            logger.exception("A stream has failed.")
            yield sse(ApiError(500, "The server failed at this request; its log says why.", code="internal_error").body)
        yield DONE


class EventStream(StreamingResponse):
    """Server-sent events. When the client has gone, its completions are aborted."""

    def __init__(self, job: Job, content: AsyncIterator[bytes], seconds: float):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._job, self._seconds = job, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        except asyncio.TimeoutError:
            logger.warning("A client did not read its stream within %.0f s.", self._seconds)
        finally:
            self._job.close()


async def _unless_disconnected(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`; None where the client has gone before."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watcher.cancel()


class RequestLog:
    """An ASGI middleware: a line of the log and a count for each answer."""

    def __init__(self, app, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.monotonic(), 0

        async def note(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        except BaseException:
            status = status or 500  # what Starlette answers further out
            raise
        finally:
            # What no route has is one path: anybody may ask for anything.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(path, status)
            if path not in ("/health", "/metrics"):
                seconds = time.monotonic() - begun
                logger.info("%s %s %d %.3f s", scope["method"], ascii(scope["path"])[1:-1], status, seconds)
