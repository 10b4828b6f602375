"""`Engine`: the queue and the slots of one model, and the step that moves both on. One thread at a time."""

import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import numpy
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..generation.cache_layers import CACHE_LAYERS
from ..generation.decoder import Decoder
from ..generation.draft_costs import room_for_drafts
from ..generation.drafts import FREE_TOKENS
from ..generation.evaluation_mode import evaluating, in_training
from ..generation.graphs import are_possible
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.pool import fused_of, version_of
from ..generation.ranks import ranks_of
from ..generation.requests import Row
from ..generation.uploads import uploaded
from .grammar import FormError, Grammar
from .intake import Intake
from .outputs import Event, Load
from .reading import Piece, Reading
from .sequence import Sequence

# Completions behind the free slots among which one is looked for that fits where the first do not.
LOOKAHEAD = 64
# Completions that are admitted in one step, and columns of it for each further one: the host admits them while the device
# computes, and has done so before the device is ready. (Numbers and no clock: the processes of a divided model do the same.)
ADMITTED, COLUMNS_PER_ADMISSION = 16, 32


class QueueFullError(RuntimeError):
    """The queue holds as many completions as it may: try again when some have been admitted."""


class Engine:
    """Decodes what is submitted, as many completions at a time as there are slots, the others in the order in which they
    came. Each gets what `diffusion_generate` gives it alone.

    Args:
        model: decides on families, policies and the device.
        tokenizer: for texts; None serves token ids.
        slots: completions that are decoded together.
        capacity: columns of each, prompt and new tokens together.
        options: of [`DiffusionGenerationConfig`], for every request that does not say otherwise.
        max_queue: completions that may wait.
        token_budget: columns of long windows in a step, see [`Decoder`].
        cache_columns: of the arena that all completions share; each takes those of its canvas and one more.
        max_passed_over: how often a completion that waits for room may be passed over by shorter ones.
        uses_graphs: whether steps on a GPU run on fused kernels, as CUDA graphs.
        draft_steps: see [`DiffusionGenerationConfig`]; for completions whose options allow it, in passes of at most
            `FREE_TOKENS` tokens, or as many as `"auto"` finds for one completion.

    Attributes:
        intake: checks requests, and makes the completions that [`submit`] takes.
        clock: seconds; processes that do the same share one.
        failure: what ended a step last.
        waiting, running: completions without and with a slot; these by their rows.
    """

    @torch.inference_mode(False)  # as `step`
    def __init__(
        self,
        model: DiffusionGenerationMixin,
        tokenizer: PreTrainedTokenizerBase | None,
        slots: int,
        capacity: int,
        options: dict,
        max_queue: int,
        token_budget: int,
        cache_columns: int,
        max_passed_over: int = 100,
        uses_graphs: bool = True,
        draft_steps: int | str | None = None,
    ):
        self.model, self.max_queue = model, max_queue
        self.max_passed_over, self._cache_columns = max_passed_over, cache_columns
        self._token_budget: float = token_budget
        options = {"prefill_chunk_size": token_budget, **options}
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Row, Sequence] = {}
        self._admitting: list[Sequence] = []
        resolved = model.resolve_options(None, options)
        has_cache, cache_dtype = resolved.cache_policy != "none", resolved.cache_dtype
        has_kernels = are_possible(model.device) and CACHE_LAYERS[cache_dtype].has_kernels(model.device)
        fused = fused_of(model)[0] if uses_graphs and has_cache and has_kernels else None
        drafts, draft_tokens = room_for_drafts(draft_steps, model, fused, resolved, (1, capacity))
        draft_tokens = draft_tokens or FREE_TOKENS
        room = {"draft_columns": draft_tokens} if drafts and has_cache else {}
        backend = model.make_backend(
            has_cache, fused=fused, arena_columns=cache_columns, cache_dtype=cache_dtype, **room
        )
        self._decoder = Decoder.open(
            backend,
            slots,
            capacity,
            drafts=drafts,
            draft_tokens=draft_tokens,
            uses_graphs=fused is not None,
            token_budget=token_budget,
            shares_beginnings=has_cache,
            caller_ends_rows=True,
        )
        limits = {"max_model_len": self.capacity + 1, "num_cache_tokens": cache_columns - 1}
        self.intake = Intake(model, tokenizer, options, limits, model.device)
        self.clock: Callable[[], float] = time.monotonic
        self.failure: str | None = None
        self._version: tuple = ()  # of the model, when beginnings were computed last
        self._modules = list(model.modules())  # a step does not look for them
        self._in_training: list[nn.Module] = []  # of them, when completions were admitted last
        self._reading = Reading(self._decoder.canvas, [])  # what a step has left and has not been told
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; the second number orders equal ones
        self._order = itertools.count()
        self._ended: list[Sequence] = []  # without a row; the next step tells it
        self._told: list[Event] = []  # those of the present step, and of one that was interrupted

    @property
    def num_forward_passes(self) -> int:
        return self._decoder.num_forward_passes

    @property
    def num_waiting(self) -> int:
        """Completions without a slot."""
        return len(self.waiting)

    @property
    def capacity(self) -> int:
        """Columns that the canvas of a completion may have."""
        return self._decoder.canvas.capacity

    def load(self) -> Load:
        """How much of the engine is in use. Between two steps."""
        seats = self._decoder.seats
        room, columns = seats.room, self._cache_columns - 1
        used = len(self.running) / len(seats.rows) if room is None else 1 - room / columns
        return Load(len(self.running), len(self.waiting), used, self.num_forward_passes)

    def check(self) -> None:
        """Raises where no program of this process can use the device again, as after some errors."""
        torch.zeros(1, device=self.model.device).item()

    def close(self) -> None:
        """Nothing is left to do where everything has ended."""

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing and tell nothing."""
        return not (self.waiting or self.running or self._ended or self._told)

    # --- requests come and go

    def submit(self, sequences: list[Sequence]) -> None:
        """Put the completions of a request at the end of the queue."""
        now = self.clock()
        for sequence in sequences:
            if math.isfinite(sequence.timeout):
                heapq.heappush(self._deadlines, (now + sequence.timeout, next(self._order), sequence))
        self.waiting.extend(sequences)
        if len(self._deadlines) > 2 * (len(self.waiting) + len(self.running)) + 64:  # most have finished long before
            self._deadlines = [each for each in self._deadlines if not each[2].is_finished]
            heapq.heapify(self._deadlines)

    def abort(self, *request_ids: str) -> None:
        """End requests with what is final of them; nothing happens where they have finished."""
        ids, left = set(request_ids), deque[Sequence]()
        for sequence in [*self.waiting, *self.running.values()]:
            if sequence.request_id in ids:
                sequence.end("abort")
        for sequence in self.waiting:
            (left if sequence.reason is None else self._ended).append(sequence)
        self.waiting = left

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.end(reason)
        if sequence.row is None:
            self.waiting.remove(sequence)
            self._ended.append(sequence)

    # --- one step

    @torch.inference_mode(False)  # what a step makes under it could not be written outside
    def step(self) -> list[Event]:
        """Move every admitted completion on by one denoising step, tell what the step before has left, and admit what fits.

        What a step has left on the canvas is read when the next one has been launched, so that the device does not wait for
        the host. A completion that ends by what is read, at an end of sequence or a stop string, has taken part in one step
        too many.

        An exception in a step ends the completions that took part in it, with the finish reason "error"; what waits goes on.
        After an interruption (Ctrl-C) they have been aborted, and it is raised.
        """
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            *_, sequence = heapq.heappop(self._deadlines)
            if sequence.reason is None and not sequence.is_finished:
                self._end(sequence, "timeout")
        try:
            if not self.running:
                self._drop_stale()
                self._admit()
            self._launch()
            self._tell()
            self._admit()
        except Exception as error:
            self._fail("error", error)
        except BaseException:
            self._fail("abort")
            raise
        self._told += [sequence.finish() for sequence in self._ended]
        self._ended = []
        events, self._told = self._told, []
        return events

    def _drop_stale(self) -> None:
        """Forget beginnings that other weights have computed: of a model in training, or whose adapters are switched."""
        seats = self._decoder.seats
        if self.waiting and seats.shares_beginnings and (version := version_of(self.model)) != self._version:
            seats.drop_beginnings()
            self._version = version

    def _admit(self) -> None:
        """Give the first that wait a slot. Where there is no memory for it, they go on waiting as long as others run."""
        self._admitting = self._next()
        for sequence in self._admitting:
            self.waiting.remove(sequence)
        rows: list[Row] = []
        while self._admitting and not rows:
            try:
                rows = self._decoder.add(*(sequence.request for sequence in self._admitting))
            except torch.OutOfMemoryError as error:
                if ranks_of(self.model) is not None:
                    raise  # other processes have taken in all of them
                # Where others run, all of them wait for these; where none do, half of them may fit.
                kept = 0 if self.running else len(self._admitting) // 2
                if not self.running and not kept:
                    self._refuse(error)
                self.waiting.extendleft(reversed(self._admitting[kept:]))
                self._admitting = self._admitting[:kept]
            except Exception as error:  # nothing is left of them in the decoder, and the others go on
                self._refuse(error)
        if rows:
            self._in_training = in_training(self._modules)
        for row, sequence in zip(rows, self._admitting):
            sequence.admit(row)
            self.running[row] = sequence
        constrained = [(row, each.grammar) for row, each in zip(rows, self._admitting) if each.grammar is not None]
        for row, grammar in constrained:
            if grammar.is_over:  # the form is the empty text
                self.running[row].end("stop")
        self._constrain(constrained)
        self._admitting = []

    def _refuse(self, error: Exception) -> None:
        """End what was to be admitted."""
        for sequence in self._admitting:
            sequence.end("error", error)
        self._ended += self._admitting
        self._admitting = []

    def _next(self) -> list[Sequence]:
        """The completions that get a slot now: the first that wait, and those behind them that fit where they do not. While the
        device has nothing to do, no more than the prompts that one step computes."""
        seats, found = self._decoder.seats, list[Sequence]()
        if not (seats.free and self.waiting):
            return found
        most, left = ADMITTED + self._decoder.columns_fed // COLUMNS_PER_ADMISSION, math.inf
        if not self.running:
            most, left = ADMITTED, self._token_budget
        free, room = min(len(seats.free), most), math.inf if seats.room is None else seats.room
        blocked: list[Sequence] = []
        for sequence in itertools.islice(self.waiting, free + LOOKAHEAD):
            if len(found) == free or left <= 0 or (blocked and blocked[0].passed_over >= self.max_passed_over):
                break
            if sequence.columns > room:
                blocked.append(sequence)
                continue
            room, left = room - sequence.columns, left - len(sequence.request.prompt)
            found.append(sequence)
            for each in blocked:
                each.passed_over += 1
        return found

    def _launch(self) -> None:
        """Settle the step before, begin to read what it has left, and launch the next."""
        device, decoder = self.model.device, self._decoder
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        # To look at hundreds of modules in each step would take longer than all that a step does for some thirty rows.
        modules = self._modules if in_training([self.model]) else self._in_training
        with torch.no_grad(), evaluating(modules), current:
            finished = set(decoder.settle())
            self._follow_grammars()
            self._reading = self._read(finished)
            if decoder.busy:
                decoder.launch()

    def _constrain(self, found: list[tuple[Row, Grammar]]) -> None:
        """Say on the canvas which tokens constrained completions may be given next."""
        if found:
            words = torch.from_numpy(numpy.stack([grammar.allowed for _, grammar in found]))
            self._decoder.canvas.allow([row for row, _ in found], words)

    def _follow_grammars(self) -> None:
        """Read which token the last step has given to each constrained completion, for which the device must have done it, and
        find out what may follow."""
        canvas, found = self._decoder.canvas, []
        for row, sequence in self.running.items():
            if (grammar := sequence.grammar) is not None and sequence.reason is None:
                column = len(row.request.prompt) + grammar.number
                found += [(row, sequence, grammar, column)] if column < row.shown else []
        if not found:
            return
        slots, columns = uploaded(torch.tensor([[row.slot, column] for row, *_, column in found]), canvas.device).T
        moved = []
        for (row, sequence, grammar, _), token in zip(found, canvas.tokens[slots, columns].tolist()):
            if token == row.mask:  # its prompt is being computed
                continue
            grammar.take(token)
            if grammar.is_over:
                sequence.end("stop")
            elif grammar.problem is not None:
                sequence.end("error", FormError(grammar.problem))
            else:
                moved.append((row, grammar))
        self._constrain(moved)

    def _read(self, finished: set[Row]) -> Reading:
        """Begin to read what a step has left. `finished`: the rows that have finished a block."""
        pieces = []
        for row in self.running:
            if not (row in finished or row.is_done):
                continue
            # A row that was ended stands in a block of which some may be final.
            index = row.block_index - (row in finished)
            start, end = row.blocks[index][0] if index < len(row.blocks) and not row.holds_draft else (0, 0)
            pieces.append(Piece(row, start, end, row.passes, row.is_done))
        return Reading(self._decoder.canvas, pieces)

    def _tell(self) -> None:
        """Make the events of what a step has left."""
        reading, self._reading = self._reading, Reading(self._decoder.canvas, [])
        for piece, counts, block, logprobs in reading:
            row, sequence = piece.row, self.running[piece.row]
            try:
                event = sequence.settle(piece.start, block, logprobs, piece.is_last)
            except (
                Exception
            ) as error:  # a tokenizer that does not know a token of the model: of no concern to the others
                sequence.end("error", error)
                event, sequence.is_over = None, True
            if event is not None:
                self._told.append(event)
            if piece.is_last or sequence.is_over:
                self._told.append(sequence.finish(piece.passes, *counts))
                del self.running[row]
                self._decoder.remove(row, sequence.text[: row.ends_at])
        for row, sequence in self.running.items():
            if sequence.shows_drafts and not row.is_done:
                try:
                    self._told.append(sequence.draft(self._decoder.canvas.text(row).tolist()))
                except Exception as error:
                    sequence.end("error", error)

    def _fail(self, reason: str, error: Exception | None = None) -> None:
        """End what took part in a step whose passes have failed, but for what steps before it have finished; after any other
        failure everything that has a slot."""
        # As text: a traceback would hold the engine.
        self.failure = None if error is None else f"{type(error).__name__}: {error}"
        rows = self._decoder.launching if error is not None else []
        try:
            self._tell()
        except Exception as failure:  # of the device, so that nothing can be read from it
            error, rows = error or failure, []
        rows = [row for row in rows if row in self.running] or [row for row in self._decoder.rows if row is not None]
        for row in rows:
            self._decoder.remove(row, is_intact=False)
        ended = [self.running.pop(row) for row in rows if row in self.running]
        for sequence in dict.fromkeys([*ended, *self._admitting]):
            if not sequence.is_finished:
                sequence.end(reason, error)
                self._ended.append(sequence)
        self._admitting = []
        self.waiting = deque(each for each in self.waiting if each.reason is None)
