"""Checks of the arguments of `diffusion_generate`, before any work starts."""

from array import array
from collections.abc import Collection, Mapping
from typing import Any

import numpy
import torch
from transformers import PreTrainedConfig

from .configuration import DiffusionGenerationConfig

DEFAULT_MAX_NEW_TOKENS = 128
# Columns of a call, all rows together: more than this is a mistake, and fits into no memory.
MAX_COLUMNS = 2**26


def unpack_inputs(inputs: Any, input_ids: Any, attention_mask: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The prompt and its mask, however they are passed: by position or by name, or together, as a tokenizer gives them.
    `token_type_ids`, which tokenizers give and these models do not read, are taken out of `kwargs`."""
    if (inputs is None) == (input_ids is None):
        problem = "There is no prompt" if inputs is None else "The prompt is given twice"
        raise ValueError(f"{problem}: pass `input_ids` (a `(1, 0)` tensor starts from nothing).")
    input_ids = inputs if input_ids is None else input_ids
    types = kwargs.pop("token_type_ids", None)
    if isinstance(input_ids, Mapping):
        encoding = input_ids
        if "input_ids" not in encoding:
            raise ValueError(f"The prompt holds {sorted(encoding)} but no `input_ids`: pass what the tokenizer gives.")
        input_ids, types = encoding["input_ids"], encoding.get("token_type_ids")
        attention_mask = encoding.get("attention_mask") if attention_mask is None else attention_mask
    if types is not None and torch.as_tensor(types).any():
        raise ValueError("`token_type_ids` other than 0 have no meaning for these models: leave them out.")
    return input_ids, attention_mask


def check_inputs(input_ids: Any, attention_mask: Any, vocab_size: int) -> tuple[torch.Tensor, list[int]]:
    """The prompts as `(batch, prompt)` int64, and the length of each without its padding."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` must be a `(batch, prompt)` tensor of token ids, but is {shape}.")
    if len(input_ids) == 0:
        raise ValueError("`input_ids` holds no row: pass at least one prompt.")
    input_ids = input_ids.long()
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            shape = tuple(getattr(attention_mask, "shape", ()))
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, but has {shape}: "
                "pass the tokenizer's 2-D mask."
            )
        if ((attention_mask != 0) & (attention_mask != 1)).any():
            raise ValueError("`attention_mask` must hold 0 (padding) and 1 (token) only.")
        if (attention_mask.long().diff(dim=-1) < 0).any():
            raise ValueError(
                "`attention_mask` is right-padded or has holes: pad on the left "
                "(`tokenizer.padding_side = 'left'`), and mark positions to fill with the mask token instead."
            )
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if attention_mask is not None:
        wrong &= attention_mask == 1
    if wrong.any():
        raise ValueError(
            f"`input_ids` holds the token id {int(input_ids[wrong][0])}, but the vocabulary has {vocab_size} tokens: "
            "was the prompt tokenized for this model?"
        )
    if attention_mask is None:
        return input_ids, [input_ids.shape[1]] * len(input_ids)
    return input_ids, (attention_mask == 1).sum(-1).tolist()


def as_array(prompt: Collection[int]) -> numpy.ndarray:
    """A prompt, `(tokens,)`. Some 10 ns a token; to look at their types before would take as long."""
    try:
        return numpy.asarray(array("q", prompt))
    except TypeError:
        wrong = next((each for each in prompt if not isinstance(each, (int, numpy.integer))), prompt)
        raise ValueError(
            f"the prompt holds {wrong!r} ({type(wrong).__name__}), which is no token id: pass a string, a list of integers, or "
            "a list of messages."
        ) from None
    except OverflowError:
        raise ValueError(f"the prompt holds the token id {max(prompt, key=abs)}, which no vocabulary has.") from None


def check_tokens(ids: numpy.ndarray, vocab_size: int) -> None:
    """Refuse a prompt, `(tokens,)`, that was made for another vocabulary."""
    for token in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"the prompt holds the token id {token}, but the vocabulary has {vocab_size} tokens: was it made for this model?"
            )


def count_new_tokens(config: DiffusionGenerationConfig, prompt_length: int, longest: int) -> int:
    """The masks to append. `prompt_length` counts the padding, `longest` is the longest prompt without it."""
    number = config.max_new_tokens
    if number is None:
        number = DEFAULT_MAX_NEW_TOKENS if config.max_length is None else config.max_length - prompt_length
    if number < 0:
        raise ValueError(
            f"`max_length={config.max_length}` is shorter than the prompt of {prompt_length} tokens: "
            "raise it, or say how many tokens to add with `max_new_tokens`."
        )
    if number == 0 and longest == 0:
        raise ValueError("`max_new_tokens=0` with an empty prompt leaves nothing to fill: raise `max_new_tokens`.")
    return number


class TooLongError(ValueError):
    """A prompt and its new tokens are more than there is room for."""


def check_fits(model_config: PreTrainedConfig, width: int, new_tokens: int, rounding: str = "") -> None:
    """Refuse a canvas that is longer than the model's positions. `rounding`: why it is longer than was asked for."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and width > positions:
        fits = width - new_tokens < positions
        remedy = (
            f"reduce `max_new_tokens={new_tokens}` (or `max_length`) or shorten"
            if fits
            else "there is no room for new tokens, shorten"
        )
        raise TooLongError(
            f"The canvas of {int(width)} positions{rounding} is longer than the {positions} positions of the model: "
            f"{remedy} the prompt."
        )


def check_block(model_config: PreTrainedConfig, config: DiffusionGenerationConfig) -> None:
    """Refuse blocks that are longer than the model's positions, where each is filled up."""
    positions, length = getattr(model_config, "max_position_embeddings", None), config.block_length or 0
    if positions is not None and length > positions:
        raise TooLongError(
            f"`block_length={length}` is more than the {positions} positions of the model, which decodes whole blocks: reduce it."
        )


def check_batch(batch: int, width: int, generator: Any, streamer: Any) -> None:
    """Refuse a batch that is too large or does not go with its generators or streamer. `batch`: rows, with
    `num_return_sequences` counted."""
    if batch * max(width, 1) > MAX_COLUMNS:
        raise ValueError(
            f"{batch:,} rows of {width:,} positions do not fit into memory: reduce `num_return_sequences`, "
            "`block_length`, `max_new_tokens` or the batch."
        )
    each = generator if isinstance(generator, (list, tuple)) else [generator] if generator is not None else []
    if not all(isinstance(one, torch.Generator) for one in each):
        raise ValueError(
            f"`generator` must be a `torch.Generator` or a list of them, but is {generator!r}: "
            "`torch.Generator().manual_seed(seed)` makes one from a seed."
        )
    if isinstance(generator, (list, tuple)) and len(generator) != batch:
        raise ValueError(
            f"`generator` lists {len(generator)} generators for {batch} rows: pass one for each row (and for each of "
            "its `num_return_sequences`), or a single one."
        )
    if streamer is not None and batch > 1:
        raise ValueError(f"`streamer` follows one sequence, but the batch has {batch}: stream them one at a time.")
