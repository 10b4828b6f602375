"""The decoding loop: rows join and leave, each at its own block and step, one denoising step at a time."""

import math
from collections.abc import Callable
from itertools import compress

import torch

from .backend import Backend
from .canvas import LISTS, Canvas, list_of
from .drafts import FREE_TOKENS, why_not
from .graphs import MAX_CAPTURED_TOKENS
from .pool import Workspace
from .requests import Request, Row
from .sampling import Noise
from .seats import Seats
from .step import Features, denoise, draw
from .uploads import uploaded
from .window import Frame, Window, make_list, make_window

# How often a row may begin a block one step later.
MAX_DELAYS = 2
# Columns of a rectangle up to which padding costs little.
SMALL_PASS = 1024


class Decoder:
    """Decodes the rows that it holds; each gets the tokens that it would get alone.

    Args:
        backend: gives the logits.
        workspace: the buffers, which fix the number of slots and of columns.
        uses_graphs: whether steps that the backend covers are captured.
        process: `(logits, rows) -> logits`, runs between forward pass and selection, over the logits of every row that the
            decoder holds, `(rows, block, vocab)`. No step is captured then: a graph does not expose its logits.
        after_step: `has_passed -> None`, runs after each step; `has_passed`: whether the step made a forward pass.
        is_hooked: whether `after_step` may change tokens, so that only the canvas knows which masks are left.
        token_budget: the number of columns that the long windows of a step may have in all, which are pieces of prompts and
            whole canvases, so that rows that denoise a block do not wait for long. One such window is always computed; the
            other rows wait, and the row that has waited longest goes first. None: no limit.
        shares_beginnings: whether rows whose prompts begin alike compute the beginning once, where blocks see earlier ones
            alone. The other rows copy its keys and values, and wait for them if need be.
        watches_steps: whether the caller looks at the canvas after each step, so that a pass with drafts must not take several at
            once. The logits of the drafts are kept then, and a step whose canvas was among them makes no forward pass.
        draft_tokens: the number of tokens up to which a pass is filled with drafts; None: no limit.
        caller_ends_rows: whether the caller ends the rows in whose blocks it finds an end of sequence. The decoder then looks
            at the device only where a strategy is adaptive, so that the device need not wait for the host.

    Attributes:
        num_forward_passes: of all rows together.
        columns_fed: of the step that was launched last, the columns of all its passes.
        launching: the rows of the step whose passes are being launched, or have failed.
    """

    def __init__(
        self,
        backend: Backend,
        workspace: Workspace,
        uses_graphs: bool = False,
        process: Callable | None = None,
        after_step: Callable[[bool], None] | None = None,
        is_hooked: bool = False,
        token_budget: int | None = None,
        shares_beginnings: bool = False,
        caller_ends_rows: bool = False,
        watches_steps: bool = False,
        draft_tokens: int | None = None,
    ):
        self.backend, self.workspace, self.canvas = backend, workspace, workspace.canvas
        if self.canvas.drafts and not getattr(backend, "takes_drafts", False):
            raise ValueError(
                f"{type(backend).__name__} has no room for the keys and values of drafts: leave `draft_steps` out."
            )
        self.uses_graphs, self.process = uses_graphs and process is None, process
        self.after_step, self.is_hooked, self.token_budget = after_step, is_hooked, token_budget
        self.caller_ends_rows, self.draft_tokens = caller_ends_rows, draft_tokens
        self.watches_steps = watches_steps or is_hooked or process is not None
        workspace.ahead.forget()
        slots, columns = self.canvas.slots, self.canvas.capacity
        self.seats = Seats(backend, workspace.state, slots, columns, shares_beginnings)
        self.rows = self.seats.rows
        self.features: dict[int, Features] = {}  # by slot, those that are equal as one object
        self._features: dict[Features, Features] = {}
        self.num_forward_passes, self.columns_fed, self._steps = 0, 0, 0
        self._launched: list[Row] = []  # rows of the step that has not been settled
        self.launching: list[Row] = []
        self._last_steps: dict[int, int] = {}  # by slot, in which step the row took part last
        self._delays: dict[int, int] = {}  # by slot, how often the row has begun a block one step later
        self._windows: dict[bool, tuple[tuple, Window]] = {}  # the last without drafts, and with

    @classmethod
    def open(cls, backend: Backend, slots: int, capacity: int, drafts: int = 0, **options) -> "Decoder":
        """A decoder with new buffers. `capacity`: columns of each slot; `drafts`: see [`Canvas`]; `options`: see the class."""
        canvas = Canvas(slots, capacity, backend.device, drafts)
        return cls(backend, Workspace(canvas, backend.open(slots, capacity + 1)), **options)

    # --- rows join and leave

    def add(self, *requests: Request, final_lengths: list[int] | None = None) -> list[Row]:
        """Begin to decode rows.

        Args:
            final_lengths: for each row, the column up to which the state is final; 0 where none are given.

        Raises:
            ValueError: there is no slot left, or a row is longer than its extent.
        """
        free = len(self.seats.free)
        if free < len(requests):
            raise ValueError(f"{len(requests)} rows do not fit into {free} free slots: remove rows first.")
        longest = max((request.length(self.backend.block_grid) for request in requests), default=0)
        if longest > self.canvas.capacity:
            raise ValueError(
                f"A canvas of {longest} columns does not fit into {self.canvas.capacity}: shorten the prompt, or ask for "
                "fewer `max_new_tokens`."
            )
        rows: list[Row] = []
        try:
            for request, length in zip(requests, final_lengths or [0] * len(requests), strict=True):
                rows.append(row := self.seats.seat(request, length))
                features = Features.of(row)
                self.features[row.slot] = self._features.setdefault(features, features)
                self._last_steps[row.slot], self._delays[row.slot] = self._steps, 0
                if not request.is_constrained and why_not(request.options) is None:
                    row.draft_steps = self.canvas.drafts
                    row.leaps = row.draft_steps > 0 and not self.watches_steps
            self.canvas.load(rows)
            present = [row for row in self.rows if row is not None]
            for index, name in enumerate(LISTS):
                widths = {row: self.features[row.slot].widths[index] for row in present}
                for width in set(widths.values()) - {0}:
                    self.canvas.load_list(name, width, [row for row in present if widths[row] <= width])
        except BaseException:
            for row in rows:
                self.remove(row, is_intact=False)
            raise
        return rows

    def remove(self, row: Row, tokens: list[int] | None = None, is_intact: bool = True) -> None:
        """Free the slot of a row, finished or not.

        Args:
            tokens: its text, where that is known: what comes next may begin with it. By default its prompt.
            is_intact: whether the state holds what the row says; not so after a pass that has failed.
        """
        if self.rows[row.slot] is row:
            self.seats.leave(row, tokens, is_intact)
            self.features.pop(row.slot)

    @property
    def busy(self) -> list[Row]:
        """The rows that are not done yet."""
        return [row for row in self.rows if row is not None and not row.is_done]

    # --- one step

    def step(self) -> list[Row]:
        """A denoising step of every row that is not done. Returns the rows that finished a block."""
        self.launch()
        return self.settle()

    def launch(self) -> None:
        """The forward passes of a step, without waiting for what comes of them on the device."""
        self.seats.take_beginnings()
        self.seats.upload()
        rows = [row for row in self.busy if not self.seats.waits(row)]
        opened = [row for row in rows if not row.is_open]
        for row in opened:
            self._open_block(row)
        if opened:
            self.canvas.load_schedules(opened)
        self._steps, self.columns_fed = self._steps + 1, 0
        rows, frames = self._within_budget(rows)
        self.launching, has_passed = rows, bool(frames)
        if self.token_budget is None:  # the rows of a call stay in step: the longer prompts first
            while chunks := {row: frame for row, frame in frames.items() if row.is_prefilling}:
                self._pass(chunks)
                frames |= {row: row.frame() for row in chunks}
        rows = [row for row in rows if not (row in frames and row.is_prefilling)]
        for group in self._groups(frames):
            self._pass(group)
        if self.after_step is not None:
            self.after_step(has_passed)
        self._launched, self.launching = rows, []

    def settle(self) -> list[Row]:
        """The end of the step that was launched last: the rows go on to their next step or block. Returns those that finished
        a block."""
        rows = [row for row in self._launched if self.rows[row.slot] is row and not row.is_done]
        self._launched = []
        checked = [row for row in rows if self._must_check(row)]
        report = self._report(checked) if checked else {}
        finished = []
        for row in rows:
            left, has_end, first_is_masked, steps = report.get(row.slot, (True, False, False, 0))
            if row.note_step(not left and row.needs_check(self.is_hooked), first_is_masked, steps):
                finished.append(row)
                if has_end:
                    row.end(row.shown)
        return finished

    def _open_block(self, row: Row) -> None:
        start, end = row.span
        if row.final_length > row.cell[0]:  # masks have been put back into a finished block
            row.final_length = self.seats.forget(row, row.cell[0])
        masked = None
        if self.is_hooked:
            masked = (self.canvas.tokens[row.slot, start:end] == row.mask).cpu()
        uniform = lambda width: Noise(self.canvas.device, [row.request.generator], [width]).uniform((1, width))[0]
        plan = row.open_block(uniform, masked)
        if plan is not None:
            self.canvas.load_plan(row, plan)

    def _within_budget(self, rows: list[Row]) -> tuple[list[Row], dict[Row, Frame]]:
        """The rows that take part in a step, and the frames of those that make a forward pass."""
        frames = {row: row.frame() for row in rows if row.wants_pass}
        if self.token_budget is None:
            return rows, frames
        longest_step = 2 * max((row.cell[1] - row.cell[0] for row in rows), default=0) + 1
        wide = {row: width for row, frame in frames.items() if (width := frame.end - frame.start) > longest_step}
        left = self.token_budget
        for row in sorted(wide, key=lambda row: self._last_steps[row.slot]):
            if wide[row] > left and left < self.token_budget:
                del frames[row]
            else:
                left -= wide[row]
                self._last_steps[row.slot], self._delays[row.slot] = self._steps, 0
        for row in self._late(rows, [row for row in frames if row not in wide]):
            del frames[row]
            rows.remove(row)
        self._last_steps.update(dict.fromkeys([row.slot for row in rows if row not in wide], self._steps))
        return [row for row in rows if row in frames or row not in wide], frames

    def _late(self, rows: list[Row], short: list[Row]) -> list[Row]:
        """Rows that begin a block one step later, so that no more begin one in this step than in others. A block's first pass feeds
        the block before it as well; steps of one size take less time than larger and smaller ones in turn, since a GPU computes
        matrix products in tiles.

        Args:
            rows: all that may take part in the step.
            short: those of them whose window is not long.
        """
        if sum(row.cell[1] - row.cell[0] for row in short) <= FREE_TOKENS:
            return []
        beginning = [row for row in short if row.is_first]
        share = math.ceil(sum(1 / max(len(row.quotas), 1) for row in rows))
        free = [
            row for row in beginning if self._delays[row.slot] < MAX_DELAYS and not (row.is_adaptive or row.speculates)
        ]
        late = free[: max(len(beginning) - share, 0)]
        for row in late:
            self._delays[row.slot] += 1
        return late

    def _must_check(self, row: Row) -> bool:
        """Whether the host must read from the device if a row's block is filled, if it holds an end of sequence, or what the
        next pass is to feed."""
        if row.speculates:
            return not row.holds_draft
        if row.needs_first:
            return True
        if self.caller_ends_rows:
            return (row.is_adaptive or row.leaps) and row.needs_check(False)
        is_last = row.step + 1 >= len(row.quotas)
        return row.needs_check(self.is_hooked) or (is_last and self.features[row.slot].widths[0] > 0)

    def _report(self, rows: list[Row]) -> dict[int, tuple[bool, bool, bool, int]]:
        """By slot what [`Canvas`] calls a report."""
        report = self.canvas.report.tolist()
        if not self.is_hooked:
            of = (report[row.slot] for row in rows)
            return {row.slot: (*map(bool, flags), steps) for row, (*flags, steps) in zip(rows, of)}
        found: dict[int, tuple[bool, bool, bool, int]] = {}
        for row in rows:
            (start, end), ends = row.span, list_of(row, LISTS[0])
            tokens = self.canvas.tokens[row.slot, :end].tolist()
            new = tokens[max(start, len(row.request.prompt)) :]
            is_left = row.mask in tokens[start : None if row.edits else row.shown]
            goes_on = is_left or (row.edits and bool(report[row.slot][0]))
            found[row.slot] = (goes_on, any(token in ends for token in new), tokens[start] == row.mask, 0)
        return found

    def _groups(self, frames: dict[Row, Frame]) -> list[dict[Row, Frame]]:
        """The rows of each forward pass of a step: one, where windows need no padding. In a rectangle pieces of prompts have
        a pass of their own, and so have long windows, unless all rows fit into a small pass."""
        if not frames or self.process is not None or self.backend.takes_lists:
            return [frames] if frames else []
        kinds: dict[str, dict[Row, Frame]] = {"piece": {}, "long": {}, "short": {}}
        blocks = {row: frame.end - frame.start for row, frame in frames.items() if not row.is_prefilling}
        is_small = max(blocks.values(), default=0) * len(blocks) <= max(SMALL_PASS, 2 * sum(blocks.values()))
        limit = 2 * max((row.cell[1] - row.cell[0] for row in blocks), default=0) + 1
        for row, frame in frames.items():
            kind = "piece" if row not in blocks else "short" if is_small or blocks[row] <= limit else "long"
            kinds[kind][row] = frame
        return [group for group in kinds.values() if group]

    def _pass(self, chosen: dict[Row, Frame]) -> None:
        """One forward pass over the windows of rows, and a denoising step of those that have a block in it."""
        if self.process is None:  # rows of one beginning may read it together
            rows = sorted(chosen, key=lambda row: self.seats.beginning_of(row.slot))
        else:  # `process` gets the logits of all rows
            rows = [row for row in self.rows if row is not None]
        frames, slots = [chosen.get(row) or self._idle_frame() for row in rows], [row.slot for row in rows]
        is_stepping = [row in chosen and not row.is_prefilling for row in rows]
        stepping = [row for row, steps in zip(rows, is_stepping) if steps]
        if self.uses_graphs and len(slots) < self.canvas.slots:
            # Each number of rows is a graph: idle rows fill it up to a power of two.
            wanted = min(1 << (len(slots) - 1).bit_length(), self.canvas.slots)
            others = sorted({*range(self.canvas.slots)}.difference(slots))[: wanted - len(slots)]
            slots, frames = slots + others, frames + [self._idle_frame()] * len(others)
        drafts = self._drafts(dict(zip(stepping, compress(frames, is_stepping))), frames) if self.canvas.drafts else {}
        window = wide = self._make_window(frames, slots)
        if drafts:
            wide = self._make_window(frames, slots, tuple(drafts.get(slot, 0) for slot in slots))
        self.columns_fed += wide.columns.numel()
        features = Features.union(self.features[row.slot] for row in chosen)
        if drafts and self.watches_steps:
            self._step_ahead(window, wide, features, self._may_capture(frames))
        else:
            noise = self._draw(features, stepping, slots, wide)
            self._run(wide, noise, features, self._may_capture(frames))
        for row in chosen:
            row.note_pass(0 if self.watches_steps else drafts.get(row.slot, 0))

    def _drafts(self, stepping: dict[Row, Frame], frames: list[Frame]) -> dict[int, int]:
        """By slot the number of drafts that a pass feeds, as many for each row as there is room for."""
        wanted = {row: row.drafts for row in stepping if row.drafts}
        most, width = self.canvas.drafts, lambda frame: frame.end - frame.start
        if self.draft_tokens is not None:
            left = self.draft_tokens - sum(map(width, frames))
            while most and sum(width(stepping[row]) * min(most, number) for row, number in wanted.items()) > left:
                most -= 1
        return {row.slot: min(most, number) for row, number in wanted.items()} if most else {}

    def _draw(
        self, features: Features, stepping: list[Row], slots: list[int], window: Window
    ) -> dict[str, torch.Tensor]:
        """The random numbers of a pass, for all its rows, of which the first are those of `slots`."""
        width, rows, device = window.block.shape[1], len(window.slots), self.canvas.device
        if not width:
            return {}
        noise = draw(features, stepping, (len(stepping), width, self.backend.vocab_size), device)
        if noise and rows > len(stepping):
            indices = uploaded(torch.tensor([slots.index(row.slot) for row in stepping]), device)
            spread = lambda each: each.new_zeros(rows, *each.shape[1:]).index_copy_(0, indices, each)
            noise = {use: spread(each) for use, each in noise.items()}
        return noise

    def _may_capture(self, frames: list[Frame]) -> bool:
        """Whether a pass may be a graph. Prompts have many lengths; those of a call do not come again, while those that ride
        along with other rows share few lengths of lists."""
        if not self.uses_graphs or self.token_budget is not None:
            return self.uses_graphs
        return not any(frame.grid and frame.end - frame.start > 2 * frame.grid for frame in frames)

    def _run(self, window: Window, noise: dict, features: Features, may_capture: bool) -> None:
        """A forward pass and what comes of it."""
        forward = lambda tokens, window: self._process(self._forward(tokens, window, features), window)
        compute = lambda window, noise: self._denoise(window, forward, noise, features)
        self._compute(features, compute, window, noise, may_capture)
        self.num_forward_passes += 1

    def _step_ahead(self, window: Window, wide: Window, features: Features, may_capture: bool) -> None:
        """A step that somebody watches, whose logits the last pass may have given. `wide`: the window with drafts."""
        canvas, ahead = self.canvas, self.workspace.ahead

        def compute(window: Window, noise: dict) -> None:
            ahead.keep(self._forward(canvas.tokens[window.texts, window.columns], window, features))

        logits = ahead.find(wide, canvas)
        if logits is None:
            ahead.note(wide, canvas)
            self._compute((features, "ahead"), compute, wide, {}, may_capture)
            self.num_forward_passes += 1
            logits = ahead.logits_of(wide, wide.copies[:, 0])
        found = logits
        self._denoise(window, lambda tokens, window: self._process(found, window), {}, features)

    def _forward(self, tokens: torch.Tensor, window: Window, features: Features) -> torch.Tensor:
        guidance = {}
        if getattr(self.backend, "cfg_scale", 0):
            is_prompt = self.canvas.is_prompt[window.owners, window.columns]
            guidance["unconditional"] = torch.where(is_prompt, features.mask_token_id, tokens)
        return self.backend(tokens, window, self.workspace.state, **guidance)

    def _process(self, logits: torch.Tensor, window: Window) -> torch.Tensor:
        if self.process is None or not window.block.shape[1]:
            return logits
        is_idle = (window.block == self.canvas.capacity).all(-1)[:, None, None]  # the logits of idle rows are undefined
        return self.process(logits.masked_fill_(is_idle, 0), [row for row in self.rows if row])

    def _denoise(self, window: Window, forward: Callable, noise: dict, features: Features) -> None:
        reads_raw_logits, part = self.backend.confidence_source == "raw", getattr(self.backend, "part", None)
        denoise(self.canvas, window, forward, noise, features, reads_raw_logits, part)

    def _compute(self, key: object, compute: Callable, window: Window, noise: dict, may_capture: bool) -> None:
        """`compute(window, noise)`, as a graph where that is possible. `key`: what it depends on besides the shapes."""
        small = window.columns.numel() <= MAX_CAPTURED_TOKENS and not window.is_canvas and window.block.shape[1]
        if may_capture and small and self.backend.covers(window):
            self.workspace.graphs.run((key, getattr(self.backend, "cfg_scale", 0)), compute, window, noise)
        else:
            compute(window, noise)

    def _make_window(self, frames: list[Frame], slots: list[int], drafts: tuple[int, ...] = ()) -> Window:
        """`drafts`: of each row, how many it has."""
        key, has_drafts = (tuple(frames), tuple(slots), drafts, *map(self.seats.beginning_of, slots)), bool(drafts)
        if has_drafts not in self._windows or self._windows[has_drafts][0] != key:
            backend, capacity, numbers = self.backend, self.canvas.capacity, None
            if drafts:
                copies = [
                    (frame, slot, 1 + index)
                    for frame, slot, number in zip(frames, slots, drafts)
                    for index in range(number)
                ]
                numbers = [0] * len(slots) + [number for *_, number in copies]
                frames, slots = frames + [frame for frame, *_ in copies], slots + [slot for _, slot, _ in copies]
            every = (frames, slots, self.canvas.slots, capacity, backend.logits_shift)
            if backend.takes_lists:
                shared = list(map(self.seats.beginning_of, slots))
                padded = MAX_CAPTURED_TOKENS if self._may_capture(frames) else 0
                pays = getattr(backend, "pays", None) if any(columns for _, columns in shared) else None
                window = make_list(*every, drafts=numbers, padded_up_to=padded, beginnings=shared, pays=pays)
                if self.seats.seeds_blocks:
                    window.following = self.seats.coming_passes()
            else:
                # A seed is not decided by the hidden state before its block, which only a recurrent cache keeps.
                has_hidden = backend.sees_earlier_blocks and not self.seats.seeds_blocks
                before = backend.logits_shift if has_hidden else 0
                window = make_window(*every, before=before, multiple=64 if self.uses_graphs else 1, drafts=numbers)
            self._windows[has_drafts] = key, window.to(self.canvas.device)
        return self._windows[has_drafts][1]

    def _idle_frame(self) -> Frame:
        """The frame of an idle slot: in a list it feeds nothing, in a rectangle the scratch column."""
        scratch = self.canvas.capacity
        return Frame(scratch, scratch + (not self.backend.takes_lists), 0, 0, 1, 0, 0, 0)
