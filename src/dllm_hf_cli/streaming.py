"""What has settled, and drafts in a terminal."""

import os
import sys
import unicodedata
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .output import printable, show, write

MASK = "░"


class SettledText(BaseStreamer):
    """Keeps the text that is final, to show it where decoding is interrupted.

    Args:
        tokenizer: decodes; special tokens are skipped.
        mask_token_id: in a draft, shown as `MASK`.
        skip_tokens: so many tokens from the start, the prompt of a conversation, are not shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, skip_tokens: int = 0):
        self.tokenizer, self.mask_token_id, self.skip_tokens = tokenizer, mask_token_id, skip_tokens
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """All is final: the caller shows it."""

    def interrupted(self) -> None:
        if text := self._settled():
            show(text)

    def _settled(self) -> str:
        return self._decode(self.tokens[self.skip_tokens :])

    def _decode(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")


class TerminalStreamer(SettledText):
    """Shows final text as it is and the draft behind it in yellow, masks as blocks.

    The library's streamer saves the cursor's position before a draft and restores it after. The saved position is one
    of the screen, not of the text: as soon as a draft scrolls the screen, which at the bottom every line break does,
    the restored position is too low and the draft's first rows stay behind. This one counts rows instead: what may
    still change starts in column 0, its rows are wrapped here, and it is never taller than the screen. It also shows
    final text at once, where the library waits for the end of the word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, skip_tokens: int = 0):
        super().__init__(tokenizer, mask_token_id, skip_tokens)
        self.printed = 0  # characters of the final text that have left the changeable area for good
        self.rows = 0  # height of the changeable area on the screen
        self.colours = ("", "") if os.environ.get("NO_COLOR") else ("\033[33m", "\033[0m")

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self._show(self._settled())

    def put_draft(self, value: torch.Tensor, **kwargs) -> None:
        runs: list[list[int]] = [[]]
        for token in (self.tokens + value.flatten().tolist())[self.skip_tokens :]:
            if token == self.mask_token_id:
                runs.append([])
            else:
                runs[-1].append(token)
        # The run that continues the final text is decoded together with it: its first token may finish a character.
        final = self._settled()
        draft = MASK.join(map(self._decode, runs))
        self._show(final, draft[len(final) :])

    def end(self) -> None:
        """Leave the final text, without a draft, on lines of its own."""
        self._show(self._settled())
        if self.rows:
            write("\n")
        self.rows = 0

    def interrupted(self) -> None:
        self.end()

    def _decode(self, tokens: list[int]) -> str:
        return printable(super()._decode(tokens).expandtabs(4))

    def _show(self, final: str, draft: str = "") -> None:
        width, height = _terminal_size()
        erase = (f"\033[{self.rows - 1}A" if self.rows > 1 else "") + "\r\033[J" if self.rows else ""
        *done, tail = wrap(final[self.printed :], width)
        self.printed += sum(map(len, done))
        rows = [row.rstrip("\n") for row in wrap(tail + draft, width)]
        if len(rows) > height - 1:
            rows = [*rows[: height - 2], "…"]
        changeable = "\n".join(rows)
        self.rows = len(rows) if changeable else 0
        colours = self.colours if len(changeable) > len(tail) else ("", "")
        write(erase + "".join(done) + tail + colours[0] + changeable[len(tail) :] + colours[1])


def wrap(text: str, width: int) -> Iterator[str]:
    """The rows that a terminal makes of a text; a row that a line break ends keeps it. The last row may be empty."""
    row, columns = "", 0
    for character in text:
        if character == "\n":
            yield row + "\n"
            row, columns = "", 0
            continue
        wanted = _columns_of(character)
        if columns + wanted > width:
            yield row
            row, columns = "", 0
        row, columns = row + character, columns + wanted
    yield row


def _columns_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _terminal_size() -> tuple[int, int]:
    try:
        width, height = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        width, height = 0, 0
    return width or 80, height or 24
