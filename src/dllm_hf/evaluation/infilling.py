"""Models fill in lines of programs, see [`human_eval`], and the programs are run.

result = evaluate(model, tokenizer, InPlace(num_masks=48), confidence_threshold=0.9)
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engine.sampling_params import SamplingParams
from ..generation.configuration import as_token_list
from .engines import effective, of_requests, open_engine
from .human_eval import TIMEOUT, Task, program, tasks
from .isolation import run


@dataclass(frozen=True)
class Prompt:
    """What a model is given of a task. token_ids: with masks where they are to be filled. new_tokens: to add behind."""

    token_ids: list[int]
    new_tokens: int


class Format(Protocol):
    """How a model is asked for a line."""

    @property
    def stop(self) -> str | None:
        """A text at which the model may stop, since the line is over."""

    def prompt(self, task: Task, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None) -> Prompt:
        """Raises a `ValueError` if the model cannot be asked in this way."""

    def filled(self, prompt: Prompt, sequence: list[int]) -> list[int]:
        """The tokens that were decided, of a decoded sequence, which begins as the prompt does."""

    def text(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """The line, of its tokens up to the end token."""


@dataclass(frozen=True)
class InPlace:
    """Masks where the line stands, between what stands before and behind it: for models that see the whole canvas.

    num_masks: how many; None: as many as the line has tokens, so that the model is told its length. The line is what is
        filled in up to the first end token.
    """

    num_masks: int | None = None
    stop: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.num_masks is not None and (type(self.num_masks) is not int or self.num_masks < 1):
            raise ValueError(f"`num_masks={self.num_masks!r}` must be an integer of at least 1, or None.")

    def prompt(self, task: Task, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None) -> Prompt:
        if mask_token_id is None:
            raise ValueError("`InPlace` is for models with a mask token: take `LeftToRight`.")
        number = len(_encode(task.middle, tokenizer)) if self.num_masks is None else self.num_masks
        before, behind = tokenizer(task.prefix)["input_ids"], _encode(task.suffix, tokenizer)
        return Prompt([*before, *[mask_token_id] * number, *behind], 0)

    def filled(self, prompt: Prompt, sequence: list[int]) -> list[int]:
        return [new for new, old in zip(sequence, prompt.token_ids, strict=True) if new != old]

    def text(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        return _decode(tokens, tokenizer)


@dataclass(frozen=True)
class LeftToRight:
    """The line behind everything else, for causal models and for those whose blocks see earlier ones alone. It ends with the
    first end token or line break.

    prefix, suffix, middle: token ids that stand before the text before the line, before that behind it, and before the line,
        as the model was trained to read them. With a `suffix` of None the model is given no text behind the line.
    suffix_first: what stands behind the line comes first, so that the model continues what stands before the line (Bavarian
        et al., section 3), as it does with a `suffix` of None. It then writes the last line break too: tokenizers make one
        token of a line break and the spaces behind it, so that a text which is cut between them is none that models have
        seen. The line is the first that is not blank.
    max_new_tokens: of the line.
    """

    prefix: Sequence[int] = ()
    suffix: Sequence[int] | None = None
    middle: Sequence[int] = ()
    suffix_first: bool = False
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        if self.suffix_first and self.suffix is None:
            raise ValueError("`suffix_first` needs `suffix`, the token ids before the text behind the line.")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens={self.max_new_tokens!r}` must be an integer of at least 1.")

    @property
    def stop(self) -> str | None:
        return None if self._continues else "\n"

    @property
    def _continues(self) -> bool:
        return self.suffix is None or self.suffix_first

    def prompt(self, task: Task, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None) -> Prompt:
        before = task.prefix.rstrip("\n") if self._continues else task.prefix
        parts = [[*self.prefix, *_encode(before, tokenizer)]]
        if self.suffix is not None:
            parts.insert(0 if self.suffix_first else 1, [*self.suffix, *_encode(task.suffix, tokenizer)])
        first = tokenizer("")["input_ids"]  # of a text, if the tokenizer has any
        return Prompt([*first, *chain(*parts), *self.middle], self.max_new_tokens)

    def filled(self, prompt: Prompt, sequence: list[int]) -> list[int]:
        return sequence[len(prompt.token_ids) :]

    def text(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        text = _decode(tokens, tokenizer)
        return (text.lstrip("\n") if self._continues else text).partition("\n")[0]


def _longest_first(prompts: list[Prompt]) -> list[int]:
    """Rows that are decoded together are about as long."""
    return sorted(range(len(prompts)), key=lambda index: -len(prompts[index].token_ids))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _before(ends: Sequence[int], tokens: list[int]) -> list[int]:
    return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]


@dataclass(frozen=True)
class Decoded:
    """What a model has made of a prompt.

    sequence: the prompt, its masks filled, and what follows it up to its end.
    num_tokens: those that were decided. num_forward_passes: those in which any was.
    """

    sequence: list[int]
    num_tokens: int
    num_forward_passes: int


@dataclass(frozen=True)
class Completion:
    """What a model has made of a task.

    is_exact: whether the line is the canonical one. isolation: of the process in which the tests ran, see [`isolation.run`].
    line_tokens: those of `line`, as the tokenizer cuts it; num_tokens, num_forward_passes: see [`Decoded`].
    """

    id: str
    line: str
    passed: bool
    is_exact: bool
    isolation: str
    line_tokens: int
    num_tokens: int
    num_forward_passes: int


@dataclass
class InfillingResult:
    """The measure of a model in one setting.

    pass_at_1, exact_match: parts of the tasks. standard_error: of `pass_at_1`, over the problems: the lines of one are not
        independent.
    tokens_per_forward: tokens that the model has decided, over the forward passes in which it decided any, those of prompts
        left out; end tokens and what stands behind them count.
    line_tokens_per_forward: the tokens of the lines alone, over the same passes.
    settings: all that the measure depends on besides the model.
    """

    pass_at_1: float
    standard_error: float
    exact_match: float
    tokens_per_forward: float
    line_tokens_per_forward: float
    num_tasks: int
    settings: dict[str, Any]
    completions: list[Completion] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format: Format,
    of: Sequence[Task] | None = None,
    *,
    end_token_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    workers: int = 2,
    timeout: float = TIMEOUT,
    progress: bool = True,
    **options: Any,
) -> InfillingResult:
    """Let a model fill in lines, and run the tests.

    Args:
        model: a diffusion model of this package, or any causal language model of `transformers`.
        format: [`InPlace`] or [`LeftToRight`].
        of: by default all of [`human_eval.tasks`].
        end_token_ids: tokens that end a line; by default the model's end of sequence.
        batch_size: rows that are decoded together.
        seed: of draws, where `options` ask for any; a causal model draws with PyTorch's generator, which is seeded.
        workers: processes in which tests run side by side. A program that has been run with this `timeout` is not run again.
        timeout: seconds of the clock that the tests of a task have.
        options: of `diffusion_generate`, or of a causal model's `generate`. Greedy where they say nothing.

    Raises:
        ValueError: the format is not for the model, or an option is wrong.
    """
    every = tasks() if of is None else list(of)
    if not every:
        raise ValueError("`of` lists no task.")
    is_diffusion = hasattr(model, "diffusion_generate")
    if isinstance(format, InPlace) and (not is_diffusion or model.sees_earlier_blocks):
        raise ValueError(
            f"`InPlace` is for models that see what stands behind the masks, and {type(model).__name__} does not: take "
            "`LeftToRight`."
        )
    own: Any = model.generation_config
    if end_token_ids is None:
        end_token_ids = as_token_list(own.eos_token_id) or as_token_list(model.config.eos_token_id)
    ends, decode, used = list(end_token_ids), _continue, {"do_sample": False, **options}
    if is_diffusion:
        decode, used = _diffuse, effective(model, {"temperature": 0.0, "eos_token_id": ends, **options})
    prompts = [format.prompt(task, tokenizer, used.get("mask_token_id")) for task in every]
    found: dict[int, Decoded] = {}
    with tqdm(total=len(every), desc="lines", disable=not progress) as bar:
        for index, decoded in decode(model, tokenizer, prompts, ends, format.stop, batch_size, seed, options):
            found[index] = decoded
            bar.update()
    decided = [found[index] for index in range(len(every))]
    lines = [_before(ends, format.filled(prompt, each.sequence)) for prompt, each in zip(prompts, decided)]
    texts = [format.text(line, tokenizer) for line in lines]
    lengths = [len(_encode(text, tokenizer)) for text in texts]
    completions = _tried(every, texts, lengths, decided, workers, timeout, progress)
    settings = {
        "format": type(format).__name__,
        **asdict(format),  # type: ignore[call-overload]  # both are dataclasses
        "end_token_ids": ends,
        "batch_size": batch_size,
        "seed": seed,
        "timeout": timeout,
        "generation": used,
    }
    return _summary(completions, settings)


def _tried(every, texts, lengths, decided, workers: int, timeout: float, progress: bool) -> list[Completion]:
    """Run the programs."""

    def check(task: Task, text: str, length: int, each: Decoded) -> Completion:
        passed, isolation = _verdict(program(task, text), timeout)
        numbers = (length, each.num_tokens, each.num_forward_passes)
        return Completion(task.id, text, passed, text == task.middle, isolation, *numbers)

    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(check, every, texts, lengths, decided)
        return list(tqdm(found, total=len(every), desc="tests", disable=not progress))


# Settings of a model mostly agree on a line, so that most programs of a second measure have been run by the first.
_verdict = lru_cache(maxsize=None)(run)


def _summary(completions: list[Completion], settings: dict[str, Any]) -> InfillingResult:
    number = len(completions)
    rate = sum(each.passed for each in completions) / number
    # The residuals of a problem's lines are added before they are squared (cluster-robust).
    residuals: dict[str, float] = {}
    for each in completions:
        problem = each.id.rpartition("/")[0]
        residuals[problem] = residuals.get(problem, 0.0) + each.passed - rate
    passes = max(sum(each.num_forward_passes for each in completions), 1)
    return InfillingResult(
        pass_at_1=rate,
        standard_error=math.sqrt(sum(each**2 for each in residuals.values())) / number,
        exact_match=sum(each.is_exact for each in completions) / number,
        tokens_per_forward=sum(each.num_tokens for each in completions) / passes,
        line_tokens_per_forward=sum(each.line_tokens for each in completions) / passes,
        num_tasks=number,
        settings=settings,
        completions=completions,
    )


def _diffuse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    ends: list[int],
    stop: str | None,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
) -> Iterator[tuple[int, Decoded]]:
    """Decode with the engine. Yields the index of each prompt with what was made of it, as they finish."""
    longest = max(len(prompt.token_ids) + prompt.new_tokens for prompt in prompts)
    llm = open_engine(model, tokenizer, options, batch_size, longest)
    options = {"temperature": 0.0, "eos_token_id": ends, **of_requests(options)}
    params = [
        SamplingParams(max_tokens=prompt.new_tokens, seed=seed + index, stop=stop, options=options)
        for index, prompt in enumerate(prompts)
    ]
    order = _longest_first(prompts)
    texts: list[Any] = [prompts[index].token_ids for index in order]
    names = [str(index) for index in order]
    with llm:
        for event in llm.generate_streaming(texts, [params[index] for index in order], request_ids=names):
            if event.output is None or event.usage is None:
                continue
            output, index = event.output, int(event.request_id)
            if output.error:
                raise RuntimeError(f"Decoding of prompt {index} failed: {output.error}")
            steps = event.usage.num_denoising_steps
            prompt = output.filled_prompt_token_ids or prompts[index].token_ids
            yield index, Decoded([*prompt, *output.token_ids], round(output.tokens_per_forward * steps), steps)


@torch.no_grad()
def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    ends: list[int],
    stop: str | None,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
) -> Iterator[tuple[int, Decoded]]:
    """As [`_diffuse`], for a causal model: a token for each pass."""
    filler = ends[0] if ends else 0
    options = {"do_sample": False, "eos_token_id": ends or None, "pad_token_id": filler, **options}
    if stop is not None:
        options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    order = _longest_first(prompts)
    torch.manual_seed(seed)
    for first in range(0, len(order), batch_size):
        batch = [(index, prompts[index].token_ids) for index in order[first : first + batch_size]]
        width = max(len(tokens) for _, tokens in batch)
        ids = [[filler] * (width - len(tokens)) + tokens for _, tokens in batch]
        seen = [[0] * (width - len(tokens)) + [1] * len(tokens) for _, tokens in batch]
        output = model.generate(
            input_ids=torch.tensor(ids).to(model.device),
            attention_mask=torch.tensor(seen).to(model.device),
            **options,
            max_new_tokens=prompts[0].new_tokens,
        )
        for (index, tokens), sequence in zip(batch, output.tolist(), strict=True):
            new = sequence[width:]
            number = min(len(_before(ends, new)) + 1, len(new))
            yield index, Decoded([*tokens, *new[:number]], number, number)
