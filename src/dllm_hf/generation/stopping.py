"""Where a row ends: stop strings, and ends of sequence."""

from bisect import bisect_left

from transformers import PreTrainedTokenizerBase

from .canvas import list_of
from .configuration import as_token_list
from .requests import Row


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


def end_of(row: Row, text: list[int]) -> int:
    """The column behind a row's last token, as far as it is known: behind the first end of sequence after the prompt, or at
    the first open position of a row that has ended. `text`: the columns of the row that are shown."""
    ends, prompt = list_of(row, "eos_token_id"), len(row.request.prompt)
    found = [column + 1 for column in range(prompt, row.shown) if text[column] in ends]
    if row.has_ended and row.mask in text:
        found.append(text.index(row.mask))
    return min([row.ends_at, *found])
