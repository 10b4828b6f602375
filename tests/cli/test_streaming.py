"""What stays on a terminal is the final text: no remains of drafts, wherever on the screen they were."""

import re
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf_cli import streaming
from dllm_hf_cli.streaming import MASK, TerminalStreamer

MASK_ID = 0x10FFFF


def characters(tokens: list[int]) -> str:
    """Tokens that are code points, decoded."""
    return "".join(map(chr, tokens))


class Terminal:
    """What a terminal of `width` x `height` makes of the few things that the streamer sends."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.lines: list[list[str]] = [[]]  # the scrolled ones too
        self.wrapped = {}  # row -> it continues the row before
        self.row = self.column = 0

    def write(self, text: str):
        for match in re.finditer(r"\033\[(\d*)([A-Za-z])|([^\033])", text):
            number, command, character = match.groups()
            if command == "A":
                top = max(0, len(self.lines) - self.height)
                self.row = max(self.row - int(number), top)
            elif command == "J":
                self.lines[self.row :] = [self.lines[self.row][: self.column]]
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self._down(wrapped=False)
            elif character:
                self._print(character)

    def flush(self):
        pass

    def _print(self, character: str):
        wide = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + wide > self.width:
            self._down(wrapped=True)
        line = self.lines[self.row]
        line[self.column :] = [character, ""][:wide]
        self.column += wide

    def _down(self, wrapped: bool):
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])
        self.wrapped[self.row] = wrapped

    def text(self) -> str:
        """As one would copy it: wrapped rows in one piece."""
        rows = ["".join(line) for line in self.lines]
        return rows[0] + "".join(("" if self.wrapped[i] else "\n") + row for i, row in enumerate(rows[1:], 1))


@pytest.fixture
def terminal(monkeypatch):
    def terminal(width=20, height=6):
        screen = Terminal(width, height)
        monkeypatch.setattr(streaming, "get_terminal_size", lambda: (width, height))
        monkeypatch.setattr("sys.stdout", screen)
        return screen

    return terminal


def tokens(text: str) -> torch.Tensor:
    return torch.tensor([MASK_ID if c == MASK else ord(c) for c in text], dtype=torch.long)


def test_final_text_and_drafts_stand_one_behind_the_other(terminal):
    screen, streamer = terminal(), TerminalStreamer(characters, MASK_ID)
    streamer.put(tokens("To be, "))
    streamer.put_draft(tokens("or ░░t"))
    assert screen.text() == "To be, or ░░t"
    streamer.put_draft(tokens("or not"))
    assert screen.text() == "To be, or not"


def test_the_prompt_of_a_conversation_is_left_out(terminal):
    screen, streamer = terminal(), TerminalStreamer(characters, MASK_ID, skip_tokens=4)
    streamer.put(tokens("Who?"))
    streamer.put_draft(tokens("I░"))
    assert screen.text() == "I░"


def test_a_draft_taller_than_the_screen_is_cut(terminal):
    screen, streamer = terminal(height=6), TerminalStreamer(characters, MASK_ID)
    streamer.put_draft(tokens("line\n" * 40))
    assert len(screen.lines) == 5 and screen.text().endswith("…")
    streamer.put(tokens("line\n" * 40))
    streamer.end()
    assert screen.text() == "line\n" * 40


def test_an_interruption_leaves_the_final_text_and_an_empty_line_to_go_on(terminal):
    screen, streamer = terminal(), TerminalStreamer(characters, MASK_ID)
    streamer.put(tokens("To be, "))
    streamer.put_draft(tokens("░" * 50))
    streamer.end()
    assert screen.text() == "To be, \n"


def test_control_characters_do_not_reach_the_terminal(terminal):
    screen, streamer = terminal(), TerminalStreamer(characters, MASK_ID)
    streamer.put(tokens("a\033[2Jb\rc\ad"))
    assert screen.text() == "a[2Jbcd"


CHARACTERS = st.sampled_from("ab \n界e\u0301")
BLOCKS = st.lists(st.tuples(st.text(CHARACTERS, max_size=60), st.lists(st.text(CHARACTERS, max_size=60), max_size=3)))


@given(blocks=BLOCKS, width=st.integers(2, 12), height=st.integers(3, 8), lines_before=st.integers(0, 9))
def test_only_the_final_text_stays_whatever_the_drafts_were(blocks, width, height, lines_before):
    with pytest.MonkeyPatch.context() as patch:
        screen = Terminal(width, height)
        patch.setattr(streaming, "get_terminal_size", lambda: (width, height))
        patch.setattr("sys.stdout", screen)
        screen.write("x\n" * lines_before)
        streamer, text = TerminalStreamer(characters, MASK_ID), ""
        for final, drafts in blocks:
            final = final.replace("\u0301", "")  # the terminal above knows no combining characters
            for draft in drafts:
                streamer.put_draft(tokens(draft.replace("\u0301", MASK)))
            streamer.put(tokens(final))
            text += final
        streamer.end()
    assert screen.text() == "x\n" * lines_before + text + ("\n" if text and not text.endswith("\n") else "")
