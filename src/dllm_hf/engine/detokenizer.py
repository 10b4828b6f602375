"""Text of tokens that come piece by piece."""

from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Turns the final tokens of a completion into text, and never takes any of it back: it holds back what a later token
    may still change, which is an unfinished character, or the beginning of a stop string.

    Args:
        tokenizer: None gives empty texts.
        stop: strings at which the text ends; the text does not show them.
        skip_special_tokens: whether the text leaves them out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: list[str], skip_special_tokens: bool = True):
        self.tokenizer, self.stop, self.skip_special_tokens = tokenizer, stop, skip_special_tokens
        self.sent = ""

    def decode(self, tokens: list[int], skip_special_tokens: bool | None = None) -> str:
        if self.tokenizer is None:
            return ""
        skip = self.skip_special_tokens if skip_special_tokens is None else skip_special_tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    def text(self, tokens: list[int]) -> str:
        """The text of all tokens of a completion, up to the first stop string."""
        text = self.decode(tokens)
        return text[: min((text.index(string) for string in self.stop if string in text), default=len(text))]

    def put(self, tokens: list[int], is_last: bool = False) -> str:
        """What a completion's text has gained for good. `tokens`: all of the completion so far."""
        text = self.text(tokens)
        if not is_last:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((_overlap(text, string) for string in self.stop), default=0)]
        if not text.startswith(
            self.sent
        ):  # a tokenizer that decodes a beginning otherwise alone than with what follows
            return ""
        added, self.sent = text[len(self.sent) :], text
        return added


def _overlap(text: str, string: str) -> int:
    """With how many of the characters at the end of a text a string may begin."""
    return next((size for size in range(len(string) - 1, 0, -1) if text.endswith(string[:size])), 0)
