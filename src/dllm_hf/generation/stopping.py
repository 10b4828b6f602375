"""Stop strings."""

from bisect import bisect_left

from transformers import PreTrainedTokenizerBase

from .configuration import as_token_list


class StopStrings:
    """Looks for strings in the text after a prompt.

    Args:
        strings: a string or a list of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, strings: str | list[str]):
        if tokenizer is None:
            raise ValueError(f"`stop_strings={strings!r}` needs the text: pass `tokenizer=` as well.")
        self.tokenizer, self.strings = tokenizer, as_token_list(strings)

    def find(self, tokens: list[int], prompt_length: int) -> int | None:
        """The column behind the token that completes the first of the strings; None where there is none."""
        new = tokens[prompt_length:]
        if not self._is_in(new):
            return None
        return prompt_length + bisect_left(range(len(new)), True, key=lambda length: self._is_in(new[:length]))

    def _is_in(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)
