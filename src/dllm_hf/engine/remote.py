"""Requests that another process decodes: how they get there, and what is known of them here."""

import multiprocessing
import os
import select
import threading
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from .heart import HANG_SECONDS
from .intake import Intake
from .outputs import Event
from .sampling_params import SamplingParams
from .sequence import Sequence

# A fork of a process that has used a GPU, or has threads, cannot go on.
CONTEXT: Any = multiprocessing.get_context("spawn")


def start(process: BaseProcess, environment: dict[str, str]) -> None:
    """Start a process with these variables. It must have them before it imports anything: CUDA reads CUDA_VISIBLE_DEVICES when
    it is first asked for a GPU, and imports ask."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def send(connection: Connection, process: BaseProcess, message: object) -> None:
    """Send a message to a process. One that has stopped to read would keep the sender waiting forever: it is killed.

    Raises:
        OSError: the process has ended.
    """
    packed = ForkingPickler.dumps(message)
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLOUT)
    if len(packed) < select.PIPE_BUF // 2 and poll.poll(0):  # there is room
        connection.send_bytes(packed)
        return
    killing = threading.Timer(HANG_SECONDS, process.kill)
    killing.daemon = True
    killing.start()
    try:
        connection.send_bytes(packed)
    finally:
        killing.cancel()


@dataclass(frozen=True)
class Submission:
    """A request on its way to another process. `params` have a seed."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    shows_texts: bool
    shows_drafts: bool

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Submission":
        """The request of some completions."""
        first = sequences[0]
        params = replace(first.params, seed=first.request.generator.initial_seed())  # type: ignore[union-attr]  # Intake's
        return cls(first.request_id, first.request.prompt, params, first.shows_texts, first.shows_drafts)

    def sequences(self, intake: Intake) -> list[Sequence]:
        """Its completions in the process that decodes them."""
        sequences = intake.prepare(self.prompt, self.params, self.request_id)
        for sequence in sequences:
            sequence.shows_texts, sequence.shows_drafts = self.shows_texts, self.shows_drafts
        return sequences


@dataclass
class Remote:
    """One completion that another process decodes. `told`: characters of its text that events have told of."""

    sequence: Sequence
    told: int = 0

    def note(self, event: Event) -> None:
        """Note what an event tells."""
        self.sequence.tokens += event.token_ids
        self.told += len(event.text)
        if event.logprobs is not None:
            self.sequence.logprobs = self.sequence.logprobs or [None] * len(self.sequence.request.prompt)
            self.sequence.logprobs += event.logprobs

    def ended(self, reason: str, error: Exception | None) -> Event:
        """The last event, where the other process does not send it."""
        self.sequence.end(reason, error)
        event = self.sequence.finish()
        return replace(event, text=event.text[self.told :])
