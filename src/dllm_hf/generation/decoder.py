"""The decoding loop: rows join and leave, each at its own block and step, one denoising step at a time."""

from collections.abc import Callable

import torch

from .backend import Backend
from .canvas import LISTS, Canvas, list_of
from .graphs import MAX_CAPTURED_TOKENS
from .pool import Workspace
from .requests import Request, Row
from .sampling import Noise
from .seats import Seats
from .step import Features, denoise, draw
from .window import Frame, Window, make_window


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

    Attributes:
        num_forward_passes: of all rows together.
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
    ):
        self.backend, self.workspace, self.canvas = backend, workspace, workspace.canvas
        self.uses_graphs, self.process = uses_graphs and process is None, process
        self.after_step, self.is_hooked, self.token_budget = after_step, is_hooked, token_budget
        self.seats = Seats(backend, workspace.state, self.canvas.slots, shares_beginnings)
        self.rows = self.seats.rows
        self.features: dict[int, Features] = {}  # by slot
        self.num_forward_passes, self._steps = 0, 0
        self._last_steps: dict[int, int] = {}  # by slot, in which step the row took part last
        self._window: tuple[tuple, Window] | None = None

    @classmethod
    def open(cls, backend: Backend, slots: int, capacity: int, **options) -> "Decoder":
        """A decoder with new buffers. `capacity`: columns of each slot; `options`: see the class."""
        canvas = Canvas(slots, capacity, backend.device)
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
        longest = max((len(request.canvas(self.backend.block_grid)) for request in requests), default=0)
        if longest > self.canvas.capacity:
            raise ValueError(
                f"A canvas of {longest} columns does not fit into {self.canvas.capacity}: shorten the prompt, or ask for "
                "fewer `max_new_tokens`."
            )
        rows: list[Row] = []
        try:
            for request, length in zip(requests, final_lengths or [0] * len(requests), strict=True):
                rows.append(row := self.seats.seat(request, length))
                self.features[row.slot], self._last_steps[row.slot] = Features.of(row), self._steps
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

    def forget(self, row: Row, column: int) -> int:
        """Forget the state of a row from `column` on. Returns the column up to which the row is final now."""
        return self.backend.forget(self.workspace.state, row.slot, row.final_length, column, row.block_length)

    @property
    def busy(self) -> list[Row]:
        """The rows that are not done yet."""
        return [row for row in self.rows if row is not None and not row.is_done]

    # --- one step

    def step(self) -> list[Row]:
        """A denoising step of every row that is not done. Returns the rows that finished a block."""
        self.seats.take_beginnings()
        rows = [row for row in self.busy if not self.seats.waits(row)]
        for row in rows:
            if not row.is_open:
                self._open_block(row)
        before = self.num_forward_passes
        self._steps += 1
        rows = self._within_budget(rows)
        while prefilling := [row for row in rows if row.wants_pass and row.is_prefilling]:
            self._pass(prefilling)
            if self.token_budget is not None:
                rows = [row for row in rows if row not in prefilling]
        for group in self._groups([row for row in rows if row.wants_pass]):
            self._pass(group)
        if self.after_step is not None:
            self.after_step(self.num_forward_passes > before)
        checked = [row for row in rows if self._must_check(row)]
        report = self._report(checked) if checked else {}
        finished = []
        for row in rows:
            left, has_end = report.get(row.slot, (True, False))
            if row.note_step(is_filled=not left and row.needs_check(self.is_hooked)):
                finished.append(row)
                if has_end:
                    row.end(row.shown)
        return finished

    def _open_block(self, row: Row) -> None:
        start, end = row.span
        if row.final_length > start:  # masks have been put back into a finished block
            row.final_length = self.forget(row, start)
        masked = None
        if self.is_hooked:
            masked = (self.canvas.tokens[row.slot, start:end] == row.mask).cpu()
        uniform = lambda width: Noise(self.canvas.device, [row.request.generator], [width]).uniform((1, width))[0]
        plan = row.open_block(uniform, masked)
        if plan is not None:
            self.canvas.load_plan(row, plan)

    def _within_budget(self, rows: list[Row]) -> list[Row]:
        """The rows that take part in a step."""
        if self.token_budget is None:
            return rows
        longest_step = 2 * max((row.span[1] - row.span[0] for row in rows), default=0) + 1
        left, kept = self.token_budget, []
        for row in sorted(rows, key=lambda row: self._last_steps[row.slot]):
            frame = row.frame() if row.wants_pass else None
            width = 0 if frame is None else frame.end - frame.start
            if width > longest_step:
                if width > left and left < self.token_budget:
                    continue
                left -= width
            kept.append(row)
            self._last_steps[row.slot] = self._steps
        return sorted(kept, key=lambda row: row.slot)

    def _must_check(self, row: Row) -> bool:
        """Whether the host must read from the device if a row's block is filled, or if it holds an end of sequence."""
        is_last = row.step + 1 >= len(row.quotas)
        return row.needs_check(self.is_hooked) or (is_last and self.features[row.slot].widths[0] > 0)

    def _report(self, rows: list[Row]) -> dict[int, tuple[bool, bool]]:
        """By slot: whether a mask is left in the shown part of the row's block, and whether the block holds an end."""
        if not self.is_hooked:
            report = self.canvas.report.tolist()
            return {row.slot: (bool(report[row.slot][0]), bool(report[row.slot][1])) for row in rows}
        found = {}
        for row in rows:
            (start, end), ends = row.span, list_of(row, LISTS[0])
            tokens = self.canvas.tokens[row.slot, :end].tolist()
            new = tokens[max(start, len(row.request.prompt)) :]
            found[row.slot] = (row.mask in tokens[start : row.shown], any(token in ends for token in new))
        return found

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of each forward pass of a step. Long windows have a pass of their own, unless all rows fit into a small
        pass: short windows would be padded to the length of the long ones."""
        if not rows or self.process is not None:
            return [rows] if rows else []
        widths = [frame.end - frame.start for frame in (row.frame() for row in rows)]
        if max(widths) * len(rows) <= max(MAX_CAPTURED_TOKENS, 2 * sum(widths)):
            return [rows]
        limit = 2 * max(row.span[1] - row.span[0] for row in rows) + 1
        wide = [row for row, width in zip(rows, widths) if width > limit]
        narrow = [row for row, width in zip(rows, widths) if width <= limit]
        return [group for group in (wide, narrow) if group]

    def _pass(self, rows: list[Row]) -> None:
        """One denoising step of the windows of rows."""
        rows = sorted(rows, key=lambda row: row.slot)
        # `process` gets the logits of all rows.
        every = rows if self.process is None else [row for row in self.rows if row is not None]
        device = self.canvas.device
        frames = [row.frame() if row in rows else self._idle_frame() for row in every]
        slots = [row.slot for row in every]
        if self.uses_graphs and len(slots) < self.canvas.slots:
            # Each number of rows is a graph: idle rows fill it up to a power of two.
            wanted = min(1 << (len(slots) - 1).bit_length(), self.canvas.slots)
            others = [slot for slot in range(self.canvas.slots) if slot not in slots][: wanted - len(slots)]
            slots, frames = slots + others, frames + [self._idle_frame()] * len(others)
        window = self._make_window(frames, slots)
        features = Features.union(self.features[row.slot] for row in rows)
        quotas = [
            [row.quotas[row.step], row.step] if row in rows and not row.is_prefilling else [0, 0] for row in every
        ]
        # Non-blocking, so that the host keeps ahead of the device.
        quota = torch.tensor(quotas + [[0, 0]] * (len(slots) - len(every))).to(device, non_blocking=True)
        noise: dict[str, torch.Tensor] = {}
        if width := window.block.shape[1]:
            noise = draw(features, rows, (len(rows), width, self.backend.vocab_size), device)
            if len(slots) > len(rows):
                indices = torch.tensor([slots.index(row.slot) for row in rows], device=device)
                spread = lambda each: each.new_zeros(len(slots), *each.shape[1:]).index_copy_(0, indices, each)
                noise = {use: spread(each) for use, each in noise.items()}
        self._run(window, quota, noise, features)
        self.num_forward_passes += 1
        for row in rows:
            row.note_pass()

    def _run(self, window: Window, quota: torch.Tensor, noise: dict, features: Features) -> None:
        backend, canvas, state = self.backend, self.canvas, self.workspace.state
        reads_raw_logits = backend.confidence_source == "raw"
        guided = getattr(backend, "cfg_scale", 0)

        def forward(tokens: torch.Tensor, window: Window) -> torch.Tensor:
            guidance = {}
            if guided:
                is_prompt = canvas.is_prompt[window.slots[:, None], window.columns]
                guidance["unconditional"] = torch.where(is_prompt, features.mask_token_id, tokens)
            logits = backend(tokens, window, state, **guidance)
            if self.process is None or not window.block.shape[1]:
                return logits
            is_idle = quota[:, :1, None] == 0  # the logits of idle rows are undefined
            return self.process(logits.masked_fill_(is_idle, 0), [row for row in self.rows if row])

        def compute(window: Window, quota: torch.Tensor, noise: dict[str, torch.Tensor]) -> None:
            denoise(canvas, window, quota, forward, noise, features, reads_raw_logits)

        small = window.columns.numel() <= MAX_CAPTURED_TOKENS and not window.is_canvas and window.block.shape[1]
        if self.uses_graphs and small and backend.covers(window):
            self.workspace.graphs.run((features, guided), compute, window, quota, noise)
        else:
            compute(window, quota, noise)

    def _make_window(self, frames: list[Frame], slots: list[int]) -> Window:
        key = (tuple(frames), tuple(slots))
        if self._window is None or self._window[0] != key:
            backend, capacity = self.backend, self.canvas.capacity
            before = backend.logits_shift if backend.sees_earlier_blocks else 0
            shapes = (self.canvas.slots, capacity, backend.logits_shift, before, 64 if self.uses_graphs else 1)
            window = make_window(frames, slots, *shapes)
            self._window = key, window.to(self.canvas.device)
        return self._window[1]

    def _idle_frame(self) -> Frame:
        """The frame of an idle slot, which feeds the scratch column."""
        return Frame(self.canvas.capacity, self.canvas.capacity + 1, 0, 0, 1, 0, 0, 0)
