"""`Workers`: an engine whose model is divided between several processes, behind the interface of [`Engine`]."""

import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..generation.mixin import DiffusionGenerationMixin
from ..generation.ranks import divides_heads
from .heart import BEAT_SECONDS, HANG_SECONDS, Beat
from .intake import Intake
from .outputs import Event, Load
from .remote import CONTEXT, Remote, Submission, send, start
from .sequence import Sequence
from .worker import Command, Stepped, run_worker

logger = logging.get_logger(__name__)

# Commands on their way: the processes have the next one before this process has read what came of the one that they work at.
IN_FLIGHT = 2
# One that has failed alone has left the others waiting for it.
FAILED_SECONDS = 2.0
POLL_SECONDS = 0.25


class WorkersError(RuntimeError):
    """A process of a group has died, hangs, or has come to another result than the others."""


@dataclass
class Exchange:
    """A command that not all processes have answered.

    submitted: completions that it takes in.
    sent: how many processes have been sent it.
    replies: by rank.
    """

    command: Command
    submitted: int
    sent: int = 0
    replies: dict[int, Stepped] = field(default_factory=dict)


class Workers:
    """Has the methods of [`Engine`] that [`Driver`] asks for. Every process has an engine on its part of the model; each step
    is one command to all of them, which do the same with it, so that they stay equal: queue, admission and decisions depend on
    nothing but the commands. No process of the group is this one, so that a group that hangs can be killed.

    A step sends the next command before it waits for what came of the one before, so that no process waits for this one. What is
    submitted or aborted takes effect one step later for that.

    Where a process dies, hangs or fails alone, all are killed, and every request gets the finish reason "error".

    Args:
        make: `LLM`, which makes the engine in each process.
        source: the folder of the model.
        arguments: of `LLM`.
        model, tokenizer: without weights, to check requests with.
        device: `cuda` or `cpu`.

    Attributes:
        failure: why the group is dead.

    Raises:
        ValueError: the model cannot be divided so.
        What fails in the first process that fails to load its part; WorkersError where a process dies meanwhile.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        source: str,
        arguments: dict[str, Any],
        model: DiffusionGenerationMixin,
        tokenizer: PreTrainedTokenizerBase | None,
        device: str,
    ):
        self.max_queue: int = arguments["max_queue"]
        self.failure: str | None = None
        self._size = size = arguments["tensor_parallel_size"]
        _check_divides(size, model)
        self._load, self._changes, self._submitted = Load(0, 0, 0.0, 0), list[Submission | set[str]](), 0
        self._unfinished: dict[tuple[str, int], Remote] = {}
        self._exchanges: deque[Exchange] = deque()
        self._is_closed = False
        threads = max(1, torch.get_num_threads() // size)
        own = {**arguments, "tensor_parallel_size": 1, "tokenizer": tokenizer, "device": None}
        pipes = [CONTEXT.Pipe() for _ in range(size)]
        self._connections: list[Connection] = [connection for connection, _ in pipes]
        self._processes: list[BaseProcess] = [
            CONTEXT.Process(
                target=run_worker,
                args=(make, inner, rank, size, device, threads, source, own),
                name=f"rank-{rank}",
                daemon=True,
            )
            for rank, (_, inner) in enumerate(pipes)
        ]
        self._end = weakref.finalize(self, _kill, self._processes, self._connections)
        try:
            for process, (_, inner) in zip(self._processes, pipes, strict=True):
                # On CPUs the library would take GPUs where it sees some.
                start(process, {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
                inner.close()  # of this process: the pipe ends with the other's
            port = self._first_message([0])[0]
            for connection in self._connections[1:]:
                connection.send(port)
            self.capacity, options, limits = self._first_message(range(size))[0]
        except BaseException:
            self._end()
            raise
        self.intake = Intake(model, tokenizer, options, limits, torch.device("cpu"))

    def _first_message(self, ranks) -> dict[int, Any]:
        """What each of these processes sends first, in whatever order."""
        messages: dict[int, Any] = {}
        while left := [rank for rank in ranks if rank not in messages]:
            for rank in self._readable(left, None):
                messages[rank] = self._receive(rank)
                if isinstance(messages[rank], Exception):
                    raise messages[rank]
        return messages

    def _readable(self, ranks: list[int], timeout: float | None) -> list[int]:
        ready = wait([self._connections[rank] for rank in ranks], timeout)
        return [rank for rank in ranks if self._connections[rank] in ready]

    def _receive(self, rank: int) -> Any:
        try:
            return self._connections[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(timeout=1)
            code = self._processes[rank].exitcode
            how = (
                f"was killed by signal {-code}" if code is not None and code < 0 else f"has ended with exit code {code}"
            )
            raise WorkersError(f"{self._name(rank)} {how}") from None

    def _name(self, rank: int) -> str:
        return f"the process of rank {rank} (pid {self._processes[rank].pid})"

    # --- the interface of an engine

    @property
    def num_waiting(self) -> int:
        # A copy: a step in another thread may change them meanwhile.
        return self._load.waiting + self._submitted + sum(each.submitted for each in tuple(self._exchanges))

    @property
    def is_idle(self) -> bool:
        return not self._unfinished

    def load(self) -> Load:
        return self._load

    def check(self) -> None:
        """Raises where the group is dead."""
        if self.failure is not None:
            raise WorkersError(f"{self.failure}: make a new `LLM`.")

    def submit(self, sequences: list[Sequence]) -> None:
        self._changes.append(Submission.of(sequences))
        self._unfinished |= {(each.request_id, each.index): Remote(each) for each in sequences}
        self._submitted += len(sequences)

    def abort(self, *request_ids: str) -> None:
        self._changes.append(set(request_ids))

    def step(self) -> list[Event]:
        """One step of every process, see [`Engine.step`]. After an interruption the next call waits for its end."""
        if self.failure is None and not self._is_closed:
            try:
                return self._noted(self._exchange())
            except WorkersError as failure:
                if not self._is_closed:
                    self.failure = str(failure)
                    logger.error("%s; its group is ended, and its requests have failed.", failure)
                self._end()
        reason = "abort" if self.failure is None else "error"
        left, self._unfinished, self._load = list(self._unfinished.values()), {}, Load(0, 0, 0.0, 0)
        self._submitted = 0
        self._exchanges.clear()
        error = None if self.failure is None else WorkersError(self.failure)
        return [each.ended(reason, error) for each in left]

    def close(self) -> None:
        """End the processes. A step in another thread, and the next one, end what has not finished."""
        self._is_closed = True
        self._end()

    # --- a step

    def _exchange(self) -> list[Stepped]:
        """Send commands to all processes, and wait for what they say to the oldest, which must agree."""
        while len(self._exchanges) < IN_FLIGHT:
            self._exchanges.append(Exchange(Command(time.monotonic(), self._changes), self._submitted))
            self._changes, self._submitted = [], 0
        for exchange in self._exchanges:
            self._send(exchange)
        self._hear(self._exchanges[0].replies)
        replies = [reply for _, reply in sorted(self._exchanges.popleft().replies.items())]
        if len({(reply.digest, reply.error) for reply in replies}) > 1:
            errors = [f"{self._name(rank)}: {reply.error}" for rank, reply in enumerate(replies) if reply.error]
            raise WorkersError(
                f"the processes have come to different results{': ' if errors else ''}{'; '.join(errors)}"
            )
        return replies

    def _send(self, exchange: Exchange) -> None:
        try:
            while (rank := exchange.sent) < self._size:
                send(self._connections[rank], self._processes[rank], exchange.command)
                exchange.sent += 1
        except (OSError, ValueError):  # ValueError: it was closed meanwhile
            while True:  # behind what it has said
                self._receive(exchange.sent)  # raises how it has ended

    def _hear(self, replies: dict[int, Stepped]) -> None:
        """Wait until all have replied to the oldest command, some perhaps to the next one as well."""
        everyone = range(self._size)
        heard, stuck, failed_at = dict.fromkeys(everyone, time.monotonic()), dict.fromkeys(everyone, 0.0), None
        while left := [rank for rank in everyone if rank not in replies]:
            for rank in self._readable(list(everyone), POLL_SECONDS):
                # Of beats that nobody has read while no step was asked for, the last one counts.
                while isinstance(message := self._receive(rank), Beat) and self._connections[rank].poll():
                    pass
                heard[rank] = time.monotonic()
                if isinstance(message, Beat):
                    stuck[rank] = message.stuck
                else:
                    next(each for each in self._exchanges if rank not in each.replies).replies[rank] = message
                    stuck = dict.fromkeys(everyone, 0.0)  # those that waited for it move now
            left = [rank for rank in left if rank not in replies]
            # One that is at work, at a compilation for example, may keep the others waiting.
            if left and min(stuck[rank] for rank in left) >= HANG_SECONDS:
                raise WorkersError(f"{' and '.join(map(self._name, left))} have not moved for {HANG_SECONDS:.0f} s")
            now = time.monotonic()
            for rank in left:
                # This process may have stood still itself.
                if now - heard[rank] > HANG_SECONDS and not self._connections[rank].poll(BEAT_SECONDS):
                    raise WorkersError(f"{self._name(rank)} has not answered for {now - heard[rank]:.0f} s")
            failed = [rank for rank, reply in replies.items() if reply.error]
            failed_at = (failed_at or now) if failed else None
            if left and failed_at is not None and now - failed_at > FAILED_SECONDS:
                raise WorkersError(f"{self._name(failed[0])} has failed: {replies[failed[0]].error}")

    def _noted(self, replies: list[Stepped]) -> list[Event]:
        self._load = replies[0].load
        for event in replies[0].events:
            remote = self._unfinished[event.request_id, event.index]
            remote.note(event)
            if event.output is not None:
                del self._unfinished[event.request_id, event.index]
        return replies[0].events


def _check_divides(size: int, model: Any) -> None:
    """Refuse a number of processes that do not all get as many heads."""
    config, asked = model.config, f"`tensor_parallel_size={size}`"
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{asked}: the model's weights are quantised, and those are not divided: take `data_parallel_size`, or weights "
            "without `quantization_config`."
        )
    if not model.tp_plan:
        raise ValueError(f"{asked}: {type(model).__name__} has no `tp_plan`, which says how a model is divided.")
    if not divides_heads(model.tp_plan):
        return
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            f"{asked} does not divide the {heads} heads of the model with {kv_heads} heads of keys and values: take a "
            "number that divides both, or one that divides the first and is a multiple of the second."
        )


def _kill(processes: list[BaseProcess], connections: list[Connection]) -> None:
    """End processes at once: one may wait for another that has gone."""
    for process in processes:
        if process.pid is not None:
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()
    for connection in connections:
        connection.close()
