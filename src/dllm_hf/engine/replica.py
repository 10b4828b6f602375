"""`Replica`: an `LLM` in a process of its own, seen from both sides of its pipes."""

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .heart import Heart, frozen_objects
from .outputs import Load
from .remote import Remote, send

CLOSING_SECONDS = 5.0


@dataclass(eq=False)
class Replica:
    """One process, as the parent sees it.

    requests, events: the pipes to it and from it.
    outstanding: its completions that have not finished, by request and index; `columns` of them all.
    heard: when it has said something last, or has been given something to do; for how many seconds it was `stuck` then.
    """

    index: int
    process: BaseProcess
    requests: Connection
    events: Connection
    load: Load = Load(0, 0, 0.0, 0)
    outstanding: dict[str, dict[int, Remote]] = field(default_factory=dict)
    columns: int = 0
    heard: float = 0.0
    stuck: float = 0.0
    _sending: threading.Lock = field(
        default_factory=threading.Lock
    )  # a handle that is closed in the middle may be another's

    def send(self, message: Any) -> None:
        """Raises OSError where its process has ended, or [`close`] was called."""
        with self._sending:
            send(self.requests, self.process, message)

    def close(self) -> None:
        """End the pipe to it, and so its process."""
        if not self._sending.acquire(timeout=CLOSING_SECONDS):  # it does not read any more
            self.process.kill()
            self._sending.acquire()
        self.requests.close()
        self._sending.release()

    @property
    def is_alive(self) -> bool:
        return not self.events.closed

    def __str__(self) -> str:
        return f"replica {self.index} (process {self.process.pid})"

    def first_message(self) -> tuple[int, dict, dict]:
        """Wait until it has loaded its model: columns of a canvas, and options and limits of its [`Intake`]."""
        try:
            message = self.events.recv()
        except (EOFError, OSError):
            self.process.join(timeout=1)
            raise RuntimeError(
                f"{self} has died with exit code {self.process.exitcode} while it was started. What it wrote says why; a "
                "script that makes an `LLM` of several replicas must do so below `if __name__ == '__main__':`."
            ) from None
        if isinstance(message, Exception):
            raise message
        return message


# --- in a replica's process


def run_replica(
    make: Callable[..., Any],
    requests: Connection,
    events: Connection,
    threads: int,
    source: str,
    arguments: dict[str, Any],
) -> None:
    """Decode what comes out of one pipe, and put events into the other, until the first one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    torch.set_num_threads(threads)
    try:
        llm = make(source, **arguments)
    except Exception as error:
        events.send(error)
        return
    with frozen_objects():
        _decode(llm, requests, events)


def _decode(llm: Any, requests: Connection, events: Connection) -> None:
    """As [`run_replica`], once its engine is there."""
    driver, mailbox = llm._driver, llm._submitted
    intake = driver.engine.intake
    events.send((driver.engine.capacity, intake.options, intake.limits))
    threading.Thread(target=_receive, args=(llm, requests), daemon=True).start()
    heart = Heart(events, llm.model.device)
    heart.start()
    while mailbox.is_open or not driver.is_closed:
        driver.wait(mailbox)
        with heart.at_work():
            driver.turn(mailbox)
        told = list(mailbox.take())
        if told:
            heart.send((told, driver.engine.load()))
        if any(event.output is not None and event.output.error is not None for event in told):
            driver.engine.check()


def _receive(llm: Any, requests: Connection) -> None:
    """A thread, so that the parent never waits for a step."""
    try:
        while True:
            message = requests.recv()
            if isinstance(message, list):
                llm._driver.abort(message)
                continue
            llm._driver.submit(message.sequences(llm._driver.engine.intake), llm._submitted)
    except (EOFError, OSError):
        pass
    finally:
        llm.close()
