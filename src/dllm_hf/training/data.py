"""Texts to train on: answers of chats, and several texts packed into a row."""

import bisect
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase


def chat_texts(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **template_options
) -> list[dict[str, list[int]]]:
    """One text for each answer of a chat: the messages before it are its prompt, which is not learnt (as in LLaDA's
    fine-tuning, arXiv:2502.09992, section 2.3).

    Args:
        messages: `{"role": ..., "content": ...}`; those of `assistant` are the answers.
        template_options: passed to `tokenizer.apply_chat_template`.

    Returns:
        `input_ids`, and `labels`, -100 on the prompt, for each text.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: set `tokenizer.chat_template`.")
    texts = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        apply: Callable[..., Any] = lambda part, **kwargs: tokenizer.apply_chat_template(
            part, tokenize=True, return_dict=False, **kwargs, **template_options
        )
        # Templates reject a chat without messages.
        prompt = apply(messages[:turn], add_generation_prompt=True) if turn else []
        whole = apply(messages[: turn + 1])
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"The chat template gives message {turn} another beginning than the prompt for it has: what is prompt "
                "and what is answer cannot be told apart. Use a template that only appends."
            )
        texts.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    if not texts:
        raise ValueError("The chat holds no message whose role is 'assistant': there is nothing to learn from it.")
    return texts


def pack(texts: Iterable[dict[str, Any]], length: int) -> list[dict[str, list[int]]]:
    """Pack several texts into a row of at most `length` tokens: the longest first, each into the fullest row that it fits
    (best fit).

    Args:
        texts: `input_ids` and, where not all is learnt, `labels`.

    Returns:
        Rows of `input_ids`, `labels` and `position_ids`, which start from 0 in each text: the models do not let the
        texts of a row see each other.
    """
    if length < 1:
        raise ValueError(f"`length={length}` must be at least 1.")
    texts = sorted((dict(text) for text in texts), key=lambda text: len(text["input_ids"]), reverse=True)
    if texts and len(texts[0]["input_ids"]) > length:
        raise ValueError(
            f"A text of {len(texts[0]['input_ids'])} tokens does not fit into rows of `length={length}`: truncate it, or "
            "make rows longer."
        )
    rows: list[dict[str, list[int]]] = []
    room: list[tuple[int, int]] = []  # sorted: tokens left, row
    for text in texts:
        ids = list(text["input_ids"])
        labels = ids if text.get("labels") is None else list(text["labels"])
        if len(labels) != len(ids):
            raise ValueError(f"A text has {len(ids)} `input_ids` and {len(labels)} `labels`: both must be as many.")
        if not ids:
            continue
        fitting = bisect.bisect_left(room, (len(ids), 0))
        if fitting == len(room):
            rows.append({"input_ids": [], "labels": [], "position_ids": []})
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(fitting)
        rows[row]["input_ids"] += ids
        rows[row]["labels"] += labels
        rows[row]["position_ids"] += range(len(ids))
        bisect.insort(room, (left - len(ids), row))
    return rows
