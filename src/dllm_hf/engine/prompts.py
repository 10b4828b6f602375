"""What a prompt may be, and its token ids."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

Prompt = str | list[int] | list[dict[str, str]]
INTEGERS = (int, numpy.integer)


def encode(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The token ids of a prompt, see [`LLM.generate`]; a list that is given is neither copied nor read: the
    numbers in it are checked when they become an array.

    Raises:
        ValueError: it is none, or needs a tokenizer or a chat template that is not there.
    """
    if isinstance(prompt, (list, tuple)) and (not prompt or isinstance(prompt[0], INTEGERS)):
        return prompt if isinstance(prompt, list) else list(prompt)
    is_chat = isinstance(prompt, (list, tuple)) and all(isinstance(turn, dict) for turn in prompt)
    if not (is_chat or isinstance(prompt, str)):
        raise ValueError(
            f"a prompt is a string, a list of token ids, or a list of messages, but not {prompt!r}{_remedy(prompt)}."
        )
    if tokenizer is None:
        raise ValueError("there is no tokenizer: pass token ids, or `tokenizer=` to `LLM`.")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no text that can be encoded: {error}") from error
        return list(tokenizer(prompt)["input_ids"]) if prompt else []
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: pass a string or token ids.")
    try:
        encoding: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # what a template raises is its own affair
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return list(encoding["input_ids"])


def prompts_of(prompts: Any) -> list[Any]:
    """One prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (Mapping, Set, bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"`prompts` must be a string, a list of token ids, a list of messages, or a list of such, but is {prompts!r}"
            f"{_remedy(prompts)}."
        )
    prompts = list(prompts)
    is_one = prompts and isinstance(prompts[0], INTEGERS) or any(isinstance(each, dict) for each in prompts)
    return [prompts] if is_one else prompts


def _remedy(prompt: Any) -> str:
    if isinstance(prompt, Mapping):
        return ": pass its `input_ids`" if "input_ids" in prompt else ": pass a list of messages"
    return ": `.tolist()` makes a list" if hasattr(prompt, "tolist") else ""
