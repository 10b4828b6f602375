"""`Driver`: one engine for several threads."""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .engine import Engine, QueueFullError
from .interrupts import interrupts_deferred
from .outputs import Event
from .sequence import Sequence


class ClosedError(ValueError):
    """[`LLM.close`] was called."""


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

    def take(self) -> Iterator[Event]:
        """What has arrived, one by one; who stops to read leaves the rest."""
        while True:
            try:
                event = self.events.popleft()
            except IndexError:  # nothing is left, or another thread has taken it
                return
            yield event


class Driver:
    """Whoever waits for events does the engine's next step, and finds its own among what comes of it. Requests are put in
    and taken out from any thread; no thread waits for a step for that."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._stepping, self._changing = threading.Lock(), threading.Condition()
        # Requests, and the ids of those to abort, in the order in which they came: an id may be taken again.
        self._arrived: deque[list[Sequence] | set[str]] = deque()
        self._number_arrived = 0  # completions among them
        self._undelivered: deque[Event] = deque()
        self._turning: set[int] = set()  # the threads that do a step, or are about to
        self._mailboxes: dict[str, Mailbox] = {}
        self.is_closed = False

    def submit(self, sequences: list[Sequence], mailbox: Mailbox) -> None:
        """Put a request at the end of the queue.

        Raises:
            ValueError: there is one of this id which has not finished.
            QueueFullError: there is no room for its completions.
        """
        request_id = sequences[0].request_id
        self._refuse_own_step()
        with interrupts_deferred(), self._changing:
            if self.is_closed:
                raise ClosedError("The `LLM` is closed: make a new one.")
            if request_id in self._mailboxes:
                raise ValueError(
                    f"`request_id={request_id!r}` is that of a request which has not finished: take another."
                )
            waiting = self.engine.num_waiting + self._number_arrived
            if waiting and waiting + len(sequences) > self.engine.max_queue:
                raise QueueFullError(
                    f"{waiting} completions are waiting, and `max_queue` is {self.engine.max_queue}: try again later."
                )
            mailbox.left[request_id] = len(sequences)
            self._mailboxes[request_id] = mailbox
            self._arrived.append(sequences)
            self._number_arrived += len(sequences)
            self._changing.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        with interrupts_deferred(), self._changing:
            self._arrived.append({request_id for request_id in request_ids if request_id in self._mailboxes})
            self._changing.notify_all()

    def turn(self, mailbox: Mailbox | None) -> None:
        """Do a step, unless there are events in a mailbox."""
        self._refuse_own_step()
        thread = threading.get_ident()
        try:
            self._turning.add(thread)
            with interrupts_deferred(), self._stepping:
                if mailbox is not None and mailbox.events:
                    return
                while self._arrived:
                    arrived = self._arrived.popleft()
                    if isinstance(arrived, set):
                        self.engine.abort(*arrived)
                    else:
                        self.engine.submit(arrived)
                        with self._changing:
                            self._number_arrived -= len(arrived)
                self._undelivered.extend(self.engine.step())
                while self._undelivered:
                    self._deliver(self._undelivered.popleft())
        finally:
            self._turning.discard(thread)

    @property
    def is_in_my_step(self) -> bool:
        """Whether this thread is in the middle of a step, or holds the lock for one, and would wait for itself: Python may collect
        an iterator that somebody has left anywhere."""
        return threading.get_ident() in self._turning

    def _refuse_own_step(self) -> None:
        """Of what the model runs in a step, such as a hook, which would wait for the step to end."""
        if self.is_in_my_step:
            raise RuntimeError("This `LLM` is in the middle of a step, which runs this code: use another `LLM` here.")

    def knows(self, request_id: str) -> bool:
        """Whether there is a request of this id which has not finished."""
        return request_id in self._mailboxes

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
            self._arrived.append(set(self._mailboxes))
            self._changing.notify_all()
