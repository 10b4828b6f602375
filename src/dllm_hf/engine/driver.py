"""`Driver`: one engine for several threads."""

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

from .engine import Engine, QueueFullError
from .outputs import Event
from .sequence import Sequence


@dataclass(eq=False)
class Mailbox:
    """Where the events of somebody's requests arrive.

    left: of each request that has not finished, how many of its completions have not.
    """

    events: deque[Event] = field(default_factory=deque)
    left: Counter[str] = field(default_factory=Counter)

    @property
    def is_open(self) -> bool:
        """Whether there is something to read, or will be."""
        return bool(self.left or self.events)


class Driver:
    """Whoever waits for events does the engine's next step, and finds its own among what comes of it. Requests are put in
    and taken out from any thread; nobody waits for a step for that."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._stepping, self._changing = threading.Lock(), threading.Condition()
        self._arrived: deque[list[Sequence]] = deque()
        self._aborted: deque[str] = deque()
        self._mailboxes: dict[str, Mailbox] = {}
        self.is_closed = False

    def submit(self, sequences: list[Sequence], mailbox: Mailbox) -> None:
        """Put a request at the end of the queue.

        Raises:
            ValueError: there is one of this id which has not finished.
            QueueFullError: there is no room for its completions.
        """
        request_id = sequences[0].request_id
        with self._changing:
            if self.is_closed:
                raise ValueError("The `LLM` is closed: make a new one.")
            if request_id in self._mailboxes:
                raise ValueError(
                    f"`request_id={request_id!r}` is that of a request which has not finished: take another."
                )
            waiting = len(self.engine.waiting) + sum(map(len, self._arrived))
            if waiting and waiting + len(sequences) > self.engine.max_queue:
                raise QueueFullError(
                    f"{waiting} completions are waiting, and `max_queue` is {self.engine.max_queue}: try again later."
                )
            self._mailboxes[request_id] = mailbox
            mailbox.left[request_id] = len(sequences)
            self._arrived.append(sequences)
            self._changing.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        with self._changing:
            self._aborted.extend(request_ids)
            self._changing.notify_all()

    def turn(self, mailbox: Mailbox) -> list[Event]:
        """The events of a mailbox; where there are none yet, those of a step."""
        with self._stepping:
            if not mailbox.events:
                while self._arrived:
                    self.engine.submit(self._arrived.popleft())
                while self._aborted:
                    self.engine.abort(self._aborted.popleft())
                for event in self.engine.step():
                    self._deliver(event)
            events = list(mailbox.events)
            mailbox.events.clear()
            return events

    def _deliver(self, event: Event) -> None:
        mailbox = self._mailboxes[event.request_id]
        mailbox.events.append(event)
        if event.output is not None:
            mailbox.left[event.request_id] -= 1
            if not mailbox.left[event.request_id]:
                del mailbox.left[event.request_id], self._mailboxes[event.request_id]

    def wait(self, mailbox: Mailbox) -> None:
        """Return when there is something to do for a mailbox, or when the driver is closed."""
        with self._changing:
            self._changing.wait_for(lambda: mailbox.is_open or self.is_closed)

    def close(self) -> None:
        """End everything. Who waits for events gets the last ones."""
        with self._changing:
            self.is_closed = True
            self._aborted.extend(self._mailboxes)
            self._changing.notify_all()
