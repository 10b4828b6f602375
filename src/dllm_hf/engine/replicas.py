"""`Replicas`: several engines, each in a process of its own, behind the interface of one."""

import atexit
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..generation.mixin import DiffusionGenerationMixin
from .heart import BEAT_SECONDS, HANG_SECONDS, Beat
from .intake import Intake
from .outputs import Event, Load
from .remote import CONTEXT, Remote, Submission, start
from .replica import CLOSING_SECONDS, Replica, run_replica
from .sequence import Sequence

logger = logging.get_logger(__name__)

# A request that another thread submits while one waits for events is sent on after that long at most.
POLL_SECONDS = 0.005
# Tokens of the beginnings by which prompts are told apart, the longest first: of a conversation, and of a chat template.
BEGINNINGS = (2048, 512, 128, 32)
MAX_BEGINNINGS = 20_000
# A beginning spares computing a part of a prompt; a replica that is fuller by so many requests takes longer than that.
MUCH_FULLER = 4


class Replicas:
    """Sends each request to the replica that has the fewest columns of canvases to decode, or to one that has decoded the
    beginning of its prompt, where that is not much fuller. Has the methods of [`Engine`] that [`Driver`] asks for; what
    Engine computes in a step, `step` receives.

    A replica whose process ends or hangs gives its requests the finish reason "error"; the others go on.

    Args:
        make: `LLM`, which is called in each process.
        source: the folder of the model.
        arguments: of `LLM`; it is asked for `data_parallel_size` replicas.
        gpus: for each replica its `CUDA_VISIBLE_DEVICES`; None on CPUs, whose threads are divided.
        model, tokenizer: without weights, to check requests with.

    Raises:
        What `make` raises, from the first replica that cannot be made; RuntimeError where its process ends.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        source: str,
        arguments: dict[str, Any],
        gpus: list[str] | None,
        model: DiffusionGenerationMixin,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.max_queue, self._slots = arguments["max_queue"], arguments["max_num_seqs"]
        self._shares_beginnings = model.sees_earlier_blocks
        self._holders: OrderedDict[int, set[int]] = OrderedDict()  # by the hash of a beginning: indices of replicas
        self._told: list[Event] = []
        self._replicas: list[Replica] = []
        self._end = weakref.finalize(self, _end, self._replicas)
        atexit.register(
            self._end
        )  # after the registration of multiprocessing, so that it runs before that waits for processes
        count = arguments["data_parallel_size"]
        threads = max(1, torch.get_num_threads() // count)
        arguments = {**arguments, "data_parallel_size": 1, "max_queue": sys.maxsize}  # whose limit is kept to here
        try:
            for index in range(count):
                environment = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus[index]}
                (receiver, requests), (events, sender) = CONTEXT.Pipe(False), CONTEXT.Pipe(False)
                inside = (make, receiver, sender, threads, source, arguments)
                process = CONTEXT.Process(target=run_replica, args=inside, name=f"replica-{index}")
                start(process, environment)
                receiver.close()
                sender.close()  # of this process: the pipe ends with the other's
                self._replicas.append(Replica(index, process, requests, events))
            for each in self._replicas:
                self.capacity, options, limits = each.first_message()
        except BaseException:
            self.close()
            raise
        self.intake = Intake(model, tokenizer, options, limits, torch.device("cpu"))

    @property
    def num_waiting(self) -> int:
        """Completions beyond the slots of their replicas."""
        # Copies: a step in another thread may change them meanwhile.
        return sum(max(sum(map(len, list(each.outstanding.values()))) - self._slots, 0) for each in self._replicas)

    @property
    def is_idle(self) -> bool:
        return not (self._told or any(each.outstanding for each in self._replicas))

    def load(self) -> Load:
        loads = [each.load for each in self._replicas if each.is_alive] or [Load(0, 0, 0.0, 0)]
        running, waiting, cache, passes = (sum(values) for values in zip(*(vars(load).values() for load in loads)))
        return Load(running, waiting, cache / len(loads), passes)

    def check(self) -> None:
        """Raises where every replica has died."""
        if not any(each.is_alive for each in self._replicas):
            raise RuntimeError("Every replica has died: make a new `LLM`.")

    def submit(self, sequences: list[Sequence]) -> None:
        """Send a request to a replica."""
        submission, columns = Submission.of(sequences), sum(each.columns for each in sequences)
        while (chosen := self._choose(submission.prompt, columns)) is not None:
            try:
                chosen.send(submission)
            except OSError:
                self._told += self._bury(chosen)
                continue
            if not chosen.outstanding:
                chosen.heard, chosen.stuck = time.monotonic(), 0.0
            chosen.outstanding[submission.request_id] = {each.index: Remote(each) for each in sequences}
            chosen.columns += columns
            return
        # Closed by another thread, or dead.
        error = RuntimeError("every replica has died") if self._end.alive else None
        self._told += [Remote(each).ended("error" if error else "abort", error) for each in sequences]

    def _choose(self, prompt: list[int], columns: int) -> Replica | None:
        alive = [each for each in self._replicas if each.is_alive and not each.requests.closed]
        if not alive:
            return None
        chosen = least = min(alive, key=lambda each: each.columns)
        if not self._shares_beginnings:
            return chosen
        keys = [hash(tuple(prompt[:length])) for length in BEGINNINGS if length <= len(prompt)]
        for key in keys:
            holders = [each for each in alive if each.index in self._holders.get(key, ())]
            if holders:
                best = min(holders, key=lambda each: each.columns)
                chosen = best if best.columns - least.columns <= MUCH_FULLER * columns else least
                break
        for key in keys:
            self._holders.setdefault(key, set()).add(chosen.index)
            self._holders.move_to_end(key)
        while len(self._holders) > MAX_BEGINNINGS:
            self._holders.popitem(last=False)
        return chosen

    def abort(self, *request_ids: str) -> None:
        """End requests with what is final of them; nothing happens where they have finished."""
        for each in self._replicas:
            own = [name for name in request_ids if name in each.outstanding]
            if own and not each.requests.closed:
                try:
                    each.send(own)
                except OSError:
                    self._told += self._bury(each)

    def step(self) -> list[Event]:
        """What replicas have told since the last call; waits a little where that is nothing."""
        events, self._told = self._told, []
        alive = {each.events: each for each in self._replicas if each.is_alive}
        for connection in wait(list(alive), 0 if events else POLL_SECONDS):
            each = alive.pop(connection)  # type: ignore[call-overload]  # nothing else was waited for
            try:
                message = each.events.recv()
            except (EOFError, OSError):
                events += self._bury(each)
                continue
            each.heard, each.stuck = time.monotonic(), message.stuck if isinstance(message, Beat) else 0.0
            if each.stuck >= HANG_SECONDS:
                events += self._bury(each, f"has not moved for {each.stuck:.0f} s")
            received, each.load = ([], each.load) if isinstance(message, Beat) else message
            for event in received:
                remote = each.outstanding[event.request_id][event.index]
                remote.note(event)
                if event.output is not None:
                    each.columns -= remote.sequence.columns
                    del each.outstanding[event.request_id][event.index]
                    if not each.outstanding[event.request_id]:
                        del each.outstanding[event.request_id]
            events += received
        # Who have said nothing, which may be because this process has stood still itself: all of them get a beat's time to answer.
        now = time.monotonic()
        late = [each for each in alive.values() if each.outstanding and now - each.heard > HANG_SECONDS]
        if late and not wait([each.events for each in late], BEAT_SECONDS):
            for each in late:
                events += self._bury(each, f"has not answered for {HANG_SECONDS:.0f} s")
        return events

    def _bury(self, dead: Replica, hangs: str | None = None) -> list[Event]:
        """End what a process that has ended has not finished, or one that `hangs`."""
        was_closed, reason, error = dead.requests.closed, "abort", None
        if hangs is not None:
            dead.process.kill()
        dead.close()
        dead.events.close()
        if not was_closed:
            dead.process.join(timeout=1)
            reason = "error"
            error = RuntimeError(f"{dead} {hangs or f'has died with exit code {dead.process.exitcode}'}")
            logger.error("%s; its requests have failed, and the other replicas go on.", error)
        left = [remote for request in dead.outstanding.values() for remote in request.values()]
        dead.outstanding, dead.columns, dead.load = {}, 0, Load(0, 0, 0.0, 0)
        return [remote.ended(reason, error) for remote in left]

    def close(self) -> None:
        """End all processes. What they have told by then can still be read."""
        self._end()
        atexit.unregister(self._end)


def _end(replicas: list[Replica]) -> None:
    """End processes: each does so itself when its pipe ends, and is killed where it does not."""
    for each in replicas:
        each.close()
    end = time.monotonic() + CLOSING_SECONDS
    for each in replicas:
        each.process.join(timeout=max(end - time.monotonic(), 0))
        if each.process.exitcode is None:
            each.process.kill()
            each.process.join()
