"""What ends a row besides an end-of-sequence token: stop strings and the library's criteria."""

from bisect import bisect_left

from transformers import MaxTimeCriteria, PreTrainedTokenizerBase, StoppingCriteria

from .configuration import DiffusionGenerationConfig, as_token_list


class StopStrings:
    """Looks for strings in what stands after a prompt.

    Args:
        strings: a string or a list of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: str | list[str]):
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


def make_criteria(config: DiffusionGenerationConfig) -> list[StoppingCriteria]:
    """The library's criteria that a configuration asks for."""
    return [] if config.max_time is None else [MaxTimeCriteria(float(config.max_time))]
