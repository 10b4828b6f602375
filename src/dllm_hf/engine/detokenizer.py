"""Text of tokens that come piece by piece."""

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns the final tokens of a completion into text, and never takes any of it back: it holds back what a later token
    may still change, which is an unfinished character, or the beginning of a stop string.

    Only the last tokens are decoded again, so that a token costs the same however long the text is: the text of
    `tokens[begin:end]` is known, and what `tokens[begin:]` has more is new.

    Args:
        tokenizer: None gives empty texts.
        stop: strings at which the text ends; the text does not show them.
        skip_special_tokens: whether the text leaves them out.

    Attributes:
        text: all that has been given away.
        is_stopped: whether a stop string has ended the tokens. Only then the text ends at one: where special tokens are left
            out, what stands on both sides of them may look like one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: list[str], skip_special_tokens: bool = True):
        self.tokenizer, self.stop, self.skip_special_tokens = tokenizer, stop, skip_special_tokens
        self.text, self._held, self._begin, self._end = "", "", 0, 0
        self.is_stopped = False

    def decode(self, tokens: list[int], skip_special_tokens: bool | None = None) -> str:
        if self.tokenizer is None:
            return ""
        skip = self.skip_special_tokens if skip_special_tokens is None else skip_special_tokens
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def put(self, tokens: list[int], is_last: bool = False) -> str:
        """What a completion's text has gained for good. `tokens`: all of the completion so far."""
        known, text = self.decode(tokens[self._begin : self._end]), self.decode(tokens[self._begin :])
        if is_last or not text.endswith("\ufffd"):
            self._held += text[len(known) :]
            self._begin, self._end = self._end, len(tokens)
        found = [self._held.index(string) for string in self.stop if self.is_stopped and string in self._held]
        if found:
            self._held = self._held[: min(found)]
        waits = 0 if is_last or found else max((_overlap(self._held, string) for string in self.stop), default=0)
        added = self._held[: len(self._held) - waits]
        self._held = self._held[len(added) :]
        self.text += added
        return added


def spell(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str | None:
    """The text of a token by itself; None without a tokenizer."""
    return None if tokenizer is None else Detokenizer(tokenizer, [], skip_special_tokens=False).decode([token])


def _overlap(text: str, string: str) -> int:
    """With how many of the characters at the end of a text a string may begin."""
    return next((size for size in range(len(string) - 1, 0, -1) if text.endswith(string[:size])), 0)
