"""`EngineThread`: the thread that steps the engine, and `Job`, what a request of HTTP waits for."""

import asyncio
import logging
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator

from ..engine import LLM, Event, SamplingParams
from ..engine.grammar import FormError
from .errors import ApiError
from .metrics import Metrics

logger = logging.getLogger(__name__)

IDLE_SECONDS = 15.0  # after which a connection without data may be taken for dead
SWITCH_SECONDS = 0.0005
MAX_DRAFTS = 64  # that wait for a client; one that reads slowly misses some


class EngineThread:
    """Owns the device: forward passes run in this thread and never in that of the event loop, which puts requests into the
    engine's queue and gets events back.

    Attributes:
        failure: why the thread has ended, where that was not asked for.
    """

    def __init__(self, llm: LLM, metrics: Metrics):
        self.llm, self.metrics = llm, metrics
        self.failure: str | None = None
        self._jobs: dict[str, Job] = {}  # by the ids of their requests
        self._arrived: deque[Event] = deque()
        self._is_woken = False
        metrics.unfinished = lambda: sum(sum(job.left.values()) for job in set(self._jobs.values()))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        # After each look at the device the engine's thread waits that long for the interpreter while the loop is busy:
        # 5 ms by default, as long as a step takes.
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()
        self._keep_alive()

    async def submit(self, requests: list[tuple[list[int], SamplingParams]], drafts: bool = False) -> "Job":
        """Put prompts with their parameters, which agree in `n`, into the queue, all or none.

        Raises:
            ValueError, QueueFullError: as [`LLM.submit`] does.
        """
        self.check()
        job = Job(self, len(requests), requests[0][1].n)

        def submit() -> None:
            for request_id, (prompt, params) in zip(job.ids, requests, strict=True):
                self.llm.submit(prompt, params, request_id=request_id, drafts=drafts)

        self._jobs.update(dict.fromkeys(job.ids, job))
        submission = asyncio.ensure_future(asyncio.to_thread(submit))
        try:
            await asyncio.shield(submission)
        except BaseException:
            # Where the client has gone, some may still be on their way into the queue.
            submission.add_done_callback(lambda done: job.close())
            submission.add_done_callback(asyncio.Future.exception)  # it is told, or nobody is left to be told
            raise
        return job

    def check(self) -> None:
        """Raises an [`ApiError`] where the engine has failed."""
        if self.failure is not None:
            raise ApiError(503, f"The engine has failed: {self.failure}", code="engine_failed")

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._jobs.pop(request_id, None)
            self.llm.abort(request_id)

    def abort_all(self) -> None:
        """End every request with what is final of it, and tell those who wait."""
        for request_id in list(self._jobs):
            self.llm.abort(request_id)

    def close(self) -> None:
        self.llm.close()
        self._thread.join(timeout=10)

    # --- in the engine's thread

    def _run(self) -> None:
        try:
            for event in self.llm.events(wait=True):
                self._arrived.append(event)
                self.metrics.load = self.llm.load()
                if not self._is_woken:
                    self._is_woken = True
                    self._loop.call_soon_threadsafe(self._deliver)
                if event.output is not None and event.output.error is not None:
                    self.llm.check()
        except BaseException as error:
            logger.exception("The engine has failed; the server must be started again.")
            self._loop.call_soon_threadsafe(self._fail, f"{type(error).__name__}: {error}")

    # --- in the event loop

    def _deliver(self) -> None:
        self._is_woken = False
        while self._arrived:
            event = self._arrived.popleft()
            job = self._jobs.get(event.request_id)
            if job is not None:
                job.put(event)
            if event.output is not None:
                self.metrics.completion_finished(event)
                if job is not None and event.request_id not in job.left:
                    del self._jobs[event.request_id]

    def _keep_alive(self) -> None:
        """One timer for all: one for each event would cost more than the event."""
        now = time.monotonic()
        for job in set(self._jobs.values()):
            job.keep_alive(now)
        self._loop.call_later(1.0, self._keep_alive)

    def _fail(self, failure: str) -> None:
        self.failure = failure
        for job in set(self._jobs.values()):
            job.fail(ApiError(500, f"The engine has failed: {failure}", code="engine_failed"))
        self._jobs.clear()


class Job:
    """Prompts of one request, each with `n` completions, which are numbered: those of the first prompt come first.

    Attributes:
        left: for each prompt that has not finished, its id with how many of its completions have not.
    """

    def __init__(self, engine: EngineThread, prompts: int, n: int):
        self.engine, self.n = engine, n
        self.ids = [uuid.uuid4().hex for _ in range(prompts)]
        self._numbers = {request_id: number for number, request_id in enumerate(self.ids)}
        self.left = dict.fromkeys(self.ids, n)
        self._inbox: asyncio.Queue[Event | ApiError | None] = asyncio.Queue()
        self._begun = self._told = time.monotonic()
        self._has_token = False

    def put(self, event: Event) -> None:
        if event.draft is not None and self._inbox.qsize() > MAX_DRAFTS:
            return
        if event.token_ids and not self._has_token:
            self._has_token = True
            self.engine.metrics.first_token(time.monotonic() - self._begun)
        self._inbox.put_nowait(event)
        self._told = time.monotonic()
        if event.output is not None:
            self.left[event.request_id] -= 1
            if not self.left[event.request_id]:
                del self.left[event.request_id]

    def keep_alive(self, now: float) -> None:
        if now - self._told > IDLE_SECONDS:
            self._told = now
            self._inbox.put_nowait(None)

    def fail(self, error: ApiError) -> None:
        self._inbox.put_nowait(error)

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """Each event with the number of its completion, to the end of the last one; None where nothing happens for long.

        Raises:
            ApiError: the engine has failed, the server is being stopped, or a step has failed.
        """
        while self.left or not self._inbox.empty():
            event = await self._inbox.get()
            if event is None:
                yield None
                continue
            if isinstance(event, ApiError):
                raise event
            if event.finish_reason == "error" and event.output is not None:
                if str(event.output.error).startswith(FormError.__name__):
                    raise ApiError(400, str(event.output.error), code="form_too_complex")
                raise ApiError(500, f"Decoding failed: {event.output.error}", code="decoding_failed")
            if event.finish_reason == "abort":
                raise ApiError(503, "The server is being stopped.", code="shutting_down")
            yield self._numbers[event.request_id] * self.n + event.index, event
        self.engine.metrics.request_finished(time.monotonic() - self._begun)

    def close(self) -> None:
        """Abort what has not finished."""
        self.engine.abort(list(self.left))
        self.left.clear()
