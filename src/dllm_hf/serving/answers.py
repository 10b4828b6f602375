"""The bodies of answers: completions, chats, and the chunks of their streams."""

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from ..engine import Event, Logprob, Usage
from ..engine.outputs import Logprobs

# What stands for a log-probability that JSON cannot spell, as in vLLM.
LOWEST = -9999.0
ROLE = {"role": "assistant", "content": ""}


class Answer:
    """Makes the bodies of one request.

    Args:
        kind: "chat", "completion" or "infill".
        options: those that take effect.
    """

    def __init__(self, kind: str, model: str, options: dict[str, Any]):
        self.kind, self.model, self.options = kind, model, options
        self.id = {"chat": "chatcmpl-", "completion": "cmpl-", "infill": "infill-"}[kind] + uuid.uuid4().hex
        self.created = int(time.time())

    def _body(self, suffix: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        name = {"chat": "chat.completion" + suffix, "completion": "text_completion"}.get(self.kind, self.kind + suffix)
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices, **more}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._body("", choices, usage=usage, diffusion=self.options)

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """`logprobs`: see [`Answer.logprobs`]."""
        content = {"message": {**ROLE, "content": text}} if self.kind == "chat" else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: list[int], logprobs: list[Logprobs] | None, offset: int = 0) -> dict[str, Any] | None:
        """What OpenAI's API has for the log-probabilities of tokens, which differs between chats and completions. `offset`:
        where their text begins, as far as it is the texts of tokens one behind the other."""
        if logprobs is None:
            return None
        each = list(zip(tokens, logprobs, strict=True))
        if self.kind == "chat":
            top = [[_entry(*one) for one in found.items() if one[1].rank is not None] for _, found in each]
            top = [sorted(entries, key=lambda entry: -entry["logprob"]) for entries in top]
            return {
                "content": [
                    {**_entry(token, found[token]), "top_logprobs": entries}
                    for (token, found), entries in zip(each, top)
                ]
            }
        texts, offsets = [_spelled(token, found[token]) for token, found in each], list[int]()
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_number(found[token]) for token, found in each],
            "top_logprobs": [{_spelled(*one): _number(one[1]) for one in found.items()} for _, found in each],
            "text_offset": offsets,
        }

    def chunk(
        self,
        index: int,
        text: str | None,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """`text`: None begins a chat."""
        content: dict[str, Any] = {"text": text or ""}
        if self.kind == "chat":
            content = {"delta": dict(ROLE) if text is None else {"content": text} if text else {}}
        return self.chunk_of({"index": index, **content, "logprobs": logprobs, "finish_reason": reason}, **more)

    def chunk_of(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self._body(".chunk", [choice], **more)

    def last_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._body(".chunk", [], usage=usage, diffusion=self.options)


def _number(logprob: Logprob) -> float:
    return logprob.logprob if logprob.logprob > LOWEST else LOWEST  # NaN is not above it either


def _spelled(token: int, logprob: Logprob) -> str:
    return f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token


def _entry(token: int, logprob: Logprob) -> dict[str, Any]:
    """A token of a chat. A part of a character has no bytes that its text tells."""
    text = _spelled(token, logprob)
    return {"token": text, "logprob": _number(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def usage_of(events: Iterable[Event], n: int = 1) -> dict[str, Any]:
    """OpenAI's `usage` of completions that have ended, `n` of each prompt, and what they took under a key of ours."""
    usages: list[Usage] = []
    transferred = 0.0
    for event in events:
        assert event.usage is not None and event.output is not None
        usages.append(event.usage)
        transferred += event.output.tokens_per_forward * event.usage.num_denoising_steps
    prompt = sum(usage.prompt_tokens for usage in usages[::n])
    completion = sum(usage.completion_tokens for usage in usages)
    steps = sum(usage.num_denoising_steps for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "diffusion": {
            "forward_passes": sum(usage.num_forward_passes for usage in usages),
            "denoising_steps": steps,
            "tokens_per_forward": round(transferred / max(steps, 1), 4),
        },
    }


def sse(body: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
