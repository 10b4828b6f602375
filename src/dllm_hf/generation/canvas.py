"""The canvas: tables with a row for each slot, which hold all that a denoising step reads and writes besides the cache."""

import torch
from transformers.utils import logging

from .configuration import as_token_list
from .drafts import drafts_of
from .remasking import RULES, SCORES, STRATEGIES
from .requests import MAX_LOGPROBS, Row
from .uploads import uploaded

logger = logging.get_logger(__name__)

# The numeric options of a row, in the order of the columns of `Canvas.numbers`.
NUMBERS = (
    *("temperature", "top_p", "min_p", "confidence_threshold", "entropy_bound", "factor", "alg_temp"),
    *("editing_threshold", "max_post_steps"),
)
LISTS = ("eos_token_id", "suppress_tokens", "confidence_suppress_tokens")
MAX_TOP_K = 2**31  # no vocabulary is larger, and a tensor takes no integers of more than 64 bits


class Canvas:
    """Tokens, options and counters of all slots. Rows are left-aligned and without padding: position = column.

    Args:
        slots: the number of rows that it has room for.
        capacity: columns of each slot.
        drafts: how many drafts of its canvas each slot has room for, see [`drafts`].

    Attributes:
        tokens: `(slots * (1 + drafts), capacity + 1)`, the canvases, then their first drafts, then their second ones. The last
            column is the scratch column: writes of padded positions land there and are never read.
        is_prompt: `(slots, capacity + 1)` bool, the prompt's tokens without its masks.
        plan: `(slots, capacity + 1)`, the step of its block at which a position may be transferred.
        schedule: `(slots, capacity + 2)`, how many tokens the steps of a row's block must have transferred, after none of them,
            after the first, and so on. Steps are those that transfer something.
        steps: `(slots,)`, how many of these steps the block has had. Of a row that speculates, how many tokens its verification
            has kept.
        numbers: `(slots, 9)` float32, see `NUMBERS`; a `top_p` or `editing_threshold` of 1 and a `min_p` or `alg_temp` of 0
            change nothing.
        choices: `(slots, 4)`: score, rule (see [`remasking`]), `top_k` (0: all), prompt length.
        lists: by name and width, `(slots, width)` token ids of the options in `LISTS`. A shorter list is padded with its
            last token, an empty one with -1.
        report: `(slots, 4)`, after the last step: whether the row's block goes on, as a rule since a mask is left in its
            shown part, whether it holds an end of sequence, whether the first of the columns that are decoded is masked, and
            `steps`.
        post_steps: `(slots,)`, steps of the row's block since it has had no mask, where its tokens may be edited.
        counts: `(slots, 2)`, forward passes that gave the row a token (of a row with editing all), and tokens that it
            received at masks.
        draft_steps, draft_levels: `(2, drafts, steps)` bool and `(2, 1 + drafts)`, the steps after the next one whose proposals
            each draft holds, see [`drafts.drafts_of`], and how many they are; for rows whose positions a score orders, and for
            others.
        saw_nan: whether logits were NaN at a position that could be transferred.
        logprobs: of tokens that steps have transferred, while a row that asks for it took part: `own`, `(slots, capacity + 1)`
            float32, NaN where no step of the row has transferred one; where a row wants more, `top` and `top_tokens`,
            `(slots, capacity + 1, MAX_LOGPROBS)` float32 and int32, falling, of which the vocabulary may not fill all.
            Empty until a row asks.
        allowed: `(slots, words)` int32, a bit for each token of the vocabulary that a row may be given, 32 to a word, the
            first token's the lowest; None until [`Canvas.allow`] is called.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device, drafts: int = 0):
        self.slots, self.capacity, self.device, self.drafts = slots, capacity, device, drafts
        zeros = lambda *shape, dtype=torch.long: torch.zeros(*shape, dtype=dtype, device=device)
        self.tokens, self.plan = zeros(slots * (1 + drafts), capacity + 1), zeros(slots, capacity + 1)
        self.schedule, self.steps = zeros(slots, capacity + 2), zeros(slots)
        self.is_prompt = zeros(slots, capacity + 1, dtype=torch.bool)
        self.numbers, self.choices = zeros(slots, len(NUMBERS), dtype=torch.float32), zeros(slots, 4)
        self.lists: dict[tuple[str, int], torch.Tensor] = {}
        self.report, self.counts = zeros(slots, 4), zeros(slots, 2)
        self.post_steps = zeros(slots)
        held = [drafts_of(STRATEGIES[name], drafts) for name in ("low_confidence_static", "sequential")]
        steps = torch.arange(max((max(each) + 1 for every in held for each in every), default=0))
        table = torch.tensor([[[step in each for step in steps] for each in every] for every in held], dtype=torch.bool)
        self.draft_steps = table.view(2, drafts, len(steps)).to(device)
        self.draft_levels = torch.nn.functional.pad(self.draft_steps.sum(-1), (1, 0))
        self.saw_nan = zeros((), dtype=torch.bool)
        self.logprobs: dict[str, torch.Tensor] = {}
        self.allowed: torch.Tensor | None = None

    def load(self, rows: list[Row]) -> None:
        """Write the initial tokens and the options of rows into their slots."""
        slots = self._indices(rows)
        width = max((row.length for row in rows), default=0)
        texts = torch.zeros(len(rows), width, dtype=torch.long)
        for text, row in zip(texts.numpy(), rows):
            number = len(row.request.prompt)
            text[:number], text[number : row.length] = row.request.ids, row.mask
        prompts = torch.tensor([len(row.request.prompt) for row in rows])
        masks = torch.tensor([row.mask for row in rows])
        is_prompt = (texts != masks[:, None]) & (torch.arange(width) < prompts[:, None])
        for table, values in ((self.tokens, texts), (self.is_prompt, is_prompt)):
            table[:, :width].index_copy_(0, slots, uploaded(values, self.device))
        self.plan.index_fill_(0, slots, 0)
        numbers = torch.tensor([numbers_of(row) for row in rows], dtype=torch.float32)
        choices = torch.tensor([choices_of(row) for row in rows])
        self.numbers.index_copy_(0, slots, uploaded(numbers, self.device))
        self.choices.index_copy_(0, slots, uploaded(choices, self.device))
        self.counts.index_fill_(0, slots, 0)
        if self.allowed is not None:
            self.allowed.index_fill_(0, slots, -1)
        asked = [row.request.logprobs for row in rows if row.request.logprobs is not None]
        if asked:
            self._make_logprobs(max(asked))
            self.logprobs["own"].index_fill_(0, slots, torch.nan)

    def allow(self, rows: list[Row], words: torch.Tensor) -> None:
        """Say which tokens the next steps may propose for constrained rows. `words`: `(rows, words)`, see `allowed`."""
        if self.allowed is None:
            self.allowed = torch.full((self.slots, words.shape[1]), -1, dtype=torch.int32, device=self.device)
        self.allowed.index_copy_(0, self._indices(rows), uploaded(words, self.device))

    def _make_logprobs(self, most: int) -> None:
        shape = (self.slots, self.capacity + 1)
        if "own" not in self.logprobs:
            self.logprobs["own"] = torch.full(shape, torch.nan, device=self.device)
        if most and "top" not in self.logprobs:
            self.logprobs["top"] = torch.full((*shape, MAX_LOGPROBS), -torch.inf, device=self.device)
            self.logprobs["top_tokens"] = torch.full((*shape, MAX_LOGPROBS), -1, dtype=torch.int32, device=self.device)

    def load_list(self, name: str, width: int, rows: list[Row]) -> None:
        """Write the token ids that an option of the rows lists into the list of so many tokens."""
        key = (name, width)
        if key not in self.lists:
            self.lists[key] = torch.full((self.slots, width), -1, device=self.device)
        values = [list_of(row, name) or [-1] for row in rows]
        values = [each + each[-1:] * (width - len(each)) for each in values]
        self.lists[key].index_copy_(0, self._indices(rows), uploaded(torch.tensor(values), self.device))

    def load_schedules(self, rows: list[Row]) -> None:
        """Write the schedules of rows that begin a block."""
        every = [[row.slot, *row.schedule] for row in rows]
        longest = max(map(len, every))
        table = uploaded(torch.tensor([each + each[-1:] * (longest - len(each)) for each in every]), self.device)
        slots, begun = table[:, 0], table[:, 1:]
        rest = begun[:, -1:].expand(-1, self.schedule.shape[1] - begun.shape[1])
        self.schedule.index_copy_(0, slots, torch.cat([begun, rest], dim=1))
        self.steps.index_fill_(0, slots, 0)

    def load_plan(self, row: Row, plan: torch.Tensor) -> None:
        """Write the step at which each position of a row's block may be transferred, `(width,)`."""
        start, end = row.span
        self.plan[row.slot, start:end] = uploaded(plan, self.device)

    def text(self, row: Row) -> torch.Tensor:
        """`(shown,)`, the tokens of a row that the output shows."""
        return self.tokens[row.slot, : row.shown]

    def _indices(self, rows: list[Row]) -> torch.Tensor:
        return uploaded(torch.tensor([row.slot for row in rows], dtype=torch.long), self.device)


def numbers_of(row: Row) -> list[float]:
    """A row of `Canvas.numbers`."""
    options = row.request.options
    values = {name: getattr(options, name) for name in NUMBERS}
    values["temperature"] = options.sampling_temperature
    values["max_post_steps"] = options.max_post_steps if row.edits else 0
    neutral = dict.fromkeys(("top_p", "editing_threshold"), 1.0)
    return [float(neutral.get(name, 0.0) if value is None else value) for name, value in values.items()]


def choices_of(row: Row) -> list[int]:
    """A row of `Canvas.choices`."""
    strategy, request = row.strategy, row.request
    score, rule = SCORES.index(strategy.confidence), RULES.index(strategy.selection)
    return [score, rule, min(request.options.top_k or 0, MAX_TOP_K), len(request.prompt)]


def list_of(row: Row, name: str) -> list[int]:
    """The token ids that an option of a row lists."""
    return as_token_list(getattr(row.request.options, name))


def warn_of_nan() -> None:
    logger.warning_once(
        "The model gave logits that are no numbers, and what was decoded from them means nothing. In float16 this is an "
        "overflow: load the model with `dtype=torch.bfloat16` or `torch.float32`."
    )
