"""Streamers: the text that is final, and drafts on a terminal."""

import os
import unicodedata
from collections.abc import Callable, Iterator
from shutil import get_terminal_size

import torch
from transformers.generation.streamers import BaseStreamer

from .output import printable, show, write

MASK = "░"


class FinalText(BaseStreamer):
    """Keeps the text that is final, and shows it where decoding is interrupted.

    Args:
        decode: makes text of token ids.
        mask_token_id: shown as `MASK` in a draft.
        skip_tokens: number of tokens at the start that are not shown: the prompt of a conversation.
    """

    def __init__(self, decode: Callable[[list[int]], str], mask_token_id: int, skip_tokens: int = 0):
        self.decode, self.mask_token_id, self.skip_tokens = decode, mask_token_id, skip_tokens
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Shows nothing: all text is final, and the caller shows it."""

    def interrupted(self) -> None:
        if text := self.final_text():
            show(text)

    def final_text(self) -> str:
        return self._text(self.tokens[self.skip_tokens :])

    def _text(self, tokens: list[int]) -> str:
        return self.decode(tokens).rstrip("\ufffd")  # stands for a character whose last bytes are still masks


class TerminalStreamer(FinalText):
    """Shows final text as it is and the draft after it in yellow, masks as blocks.

    `TextDiffusionStreamer` of transformers saves the cursor's position before a draft and restores it after. The saved
    position is a row of the screen, not of the text: when a draft scrolls the screen, which every line break at the
    bottom does, the restored position is too low and the draft's first rows stay. This streamer counts rows instead:
    the rows that may change start in column 0, are wrapped here, and are never taller than the screen. It also shows
    final text at once, where the library waits for the end of the word.
    """

    def __init__(self, decode: Callable[[list[int]], str], mask_token_id: int, skip_tokens: int = 0):
        super().__init__(decode, mask_token_id, skip_tokens)
        self.printed = 0  # characters of the final text that stand above the rows that may change
        self.rows = 0  # number of rows that may change
        self.colours = ("", "") if os.environ.get("NO_COLOR") else ("\033[33m", "\033[0m")

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self._show(self.final_text())

    def put_draft(self, value: torch.Tensor) -> None:
        runs: list[list[int]] = [[]]  # of tokens between masks
        for token in self.tokens[self.skip_tokens :] + value.flatten().tolist():
            if token == self.mask_token_id:
                runs.append([])
            else:
                runs[-1].append(token)
        # The first run begins with the final tokens: the token after them may complete their last character.
        final = self.final_text()
        self._show(final, MASK.join(map(self._text, runs))[len(final) :])

    def end(self) -> None:
        """Leaves the final text, without a draft, on lines of its own."""
        self._show(self.final_text())
        if self.rows:
            write("\n")
        self.rows = 0

    def interrupted(self) -> None:
        self.end()

    def _text(self, tokens: list[int]) -> str:
        return printable(super()._text(tokens).expandtabs(4))

    def _show(self, final: str, draft: str = "") -> None:
        width, height = get_terminal_size()
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
