"""The canvas: one table with a row for each slot, of all that a denoising step reads and writes besides the cache."""

import torch

from .configuration import as_token_list
from .remasking import RULES, SCORES
from .requests import Row

# Of the numbers of a row's options, in the order of the table's columns.
NUMBERS = ("temperature", "top_p", "min_p", "confidence_threshold", "entropy_bound", "factor", "alg_temp")
LISTS = ("eos_token_id", "suppress_tokens", "confidence_suppress_tokens")


class Canvas:
    """Tokens, options and counters of all slots. Rows are left-aligned and without padding: position = column.

    Args:
        slots: rows that there is room for.
        capacity: columns of each.

    Attributes:
        tokens: `(slots, capacity + 1)`. The last one is the scratch column: what is written for positions that repeat goes
            there, and nothing reads it.
        given: `(slots, capacity + 1)` bool, the tokens that came with a prompt.
        plan: `(slots, capacity + 1)`, the step of its block at which a position may be transferred.
        numbers: `(slots, 7)` float32, see `NUMBERS`; a `top_p` of 1 and a `min_p` or `alg_temp` of 0 change nothing.
        choices: `(slots, 4)`: score, rule (see [`remasking`]), `top_k` (0: all), prompt length.
        lists: by name and width, `(slots, width)` token ids of the options in `LISTS`; a row that has fewer repeats its
            last one, and -1 stands where it has none.
        report: `(slots, 2)`, whether a mask is left in the row's block among what is shown, and whether it holds an end of
            sequence, both after the last step.
        counts: `(slots, 2)`, forward passes that gave the row a token, and tokens that it received.
        saw_nan: whether logits were no numbers where something was to be transferred.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device):
        self.slots, self.capacity, self.device = slots, capacity, device
        zeros = lambda *shape, dtype=torch.long: torch.zeros(*shape, dtype=dtype, device=device)
        self.tokens, self.plan = zeros(2, slots, capacity + 1)
        self.given = zeros(slots, capacity + 1, dtype=torch.bool)
        self.numbers, self.choices = zeros(slots, len(NUMBERS), dtype=torch.float32), zeros(slots, 4)
        self.lists: dict[tuple[str, int], torch.Tensor] = {}
        self.report, self.counts = zeros(2, slots, 2)
        self.saw_nan = zeros((), dtype=torch.bool)

    def place(self, rows: list[Row]) -> None:
        """Write what rows begin with into their slots."""
        slots = self._indices(rows)
        width = max((row.length for row in rows), default=0)
        texts = torch.tensor([row.text + [0] * (width - row.length) for row in rows]).view(len(rows), width)
        prompts = torch.tensor([len(row.request.prompt) for row in rows])
        masks = torch.tensor([row.mask for row in rows])
        given = (texts != masks[:, None]) & (torch.arange(width) < prompts[:, None])
        for table, values in ((self.tokens, texts), (self.given, given), (self.plan, torch.zeros_like(texts))):
            table[:, :width].index_copy_(0, slots, values.to(self.device, non_blocking=True))
        numbers = torch.tensor([numbers_of(row) for row in rows], dtype=torch.float32)
        choices = [
            (SCORES.index(row.strategy.confidence), RULES.index(row.strategy.selection), row.request.options.top_k or 0)
            for row in rows
        ]
        choices = torch.tensor([(*each, len(row.request.prompt)) for each, row in zip(choices, rows, strict=True)])
        self.numbers.index_copy_(0, slots, numbers.to(self.device, non_blocking=True))
        self.choices.index_copy_(0, slots, choices.to(self.device, non_blocking=True))
        self.counts.index_fill_(0, slots, 0)

    def place_list(self, name: str, width: int, rows: list[Row]) -> torch.Tensor:
        """`(slots, width)` with the token ids that an option of the rows lists."""
        key = (name, width)
        if key not in self.lists:
            self.lists[key] = torch.full((self.slots, width), -1, device=self.device)
        values = [list_of(row, name) for row in rows]
        values = [(each or [-1]) + (each or [-1])[-1:] * (width - max(len(each), 1)) for each in values]
        self.lists[key].index_copy_(0, self._indices(rows), torch.tensor(values).to(self.device, non_blocking=True))
        return self.lists[key]

    def place_plan(self, row: Row, plan: torch.Tensor) -> None:
        """Say at which step of its block each position of it may be transferred, `(width,)`."""
        start, end = row.span
        self.plan[row.slot, start:end] = plan.to(self.device)

    def text(self, row: Row) -> torch.Tensor:
        """`(shown,)`, what the output shows of a row."""
        return self.tokens[row.slot, : row.shown]

    def _indices(self, rows: list[Row]) -> torch.Tensor:
        return torch.tensor([row.slot for row in rows], dtype=torch.long).to(self.device, non_blocking=True)


def numbers_of(row: Row) -> list[float]:
    options = row.request.options
    values = {name: getattr(options, name) for name in NUMBERS}
    values["temperature"] = options.sampling_temperature
    return [float(value if value is not None else name == "top_p") for name, value in values.items()]


def list_of(row: Row, name: str) -> list[int]:
    """The token ids that an option of a row lists."""
    return as_token_list(getattr(row.request.options, name))
