"""A model writes text. It does not control the terminal that shows it, and what has settled is not lost."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dllm_hf import LLaDAModelLM
from dllm_hf_cli import main
from dllm_hf_cli.output import printable

from .conftest import CHAT_TEMPLATE

EVIL = "\x1b\x07\r\b\x00\x7f\x9b\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.fixture(scope="module")
def evil(folder, tmp_path_factory):
    """A model whose tokens are such characters, but for some."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "evil")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    letters = [letter for letter in vocabulary if letter.isalpha() and len(letter) == 1 and letter not in "Hi"]
    for index, letter in enumerate(letters):
        # A vocabulary holds each text once.
        vocabulary[EVIL[index % len(EVIL)] + letter] = vocabulary.pop(letter)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return copy


def on_terminal(monkeypatch, **environment):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(name, value)


def say(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


WAYS = [
    ("generate", "Hi", "--no-stream"),
    ("generate", "Hi", "--num-return-sequences", "3"),
    ("chat", "--no-stream"),
    ("chat", "--num-return-sequences", "2"),
]


@pytest.mark.parametrize("command, arguments", [(command, rest) for command, *rest in WAYS], ids=str)
def test_a_terminal_is_shown_none_of_them_and_a_pipe_gets_the_text_as_it_is(run, evil, monkeypatch, command, arguments):
    on_terminal(monkeypatch)
    options = ["--seed", 1, "--temperature", 1.0]
    say(monkeypatch, "Hi")
    code, shown, stderr = run(command, evil, *arguments, *options)
    assert code == 0 and len(shown) > 10
    assert not set(shown) & set(EVIL) and not set(stderr) & set(EVIL)
    say(monkeypatch, "Hi")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    _, piped, _ = run(command, evil, *arguments, *options)
    assert set(piped) & set(EVIL) and printable(piped) == shown


@pytest.mark.parametrize("command, arguments", [("generate", ["Hi"]), ("chat", [])])
def test_neither_do_drafts_hold_any(run, evil, monkeypatch, command, arguments):
    on_terminal(monkeypatch, NO_COLOR="1")
    say(monkeypatch, "Hi")
    code, shown, _ = run(command, evil, *arguments, "--temperature", 1.0)
    # What is left is the streamer's own: it goes up some rows, and erases from there.
    for own in ("\r\033[J", *(f"\033[{rows}A" for rows in range(30))):
        shown = shown.replace(own, "")
    assert code == 0 and "░" in shown and not set(shown) & set(EVIL)


def test_line_breaks_tabs_and_every_other_character_are_shown():
    text = "a\tb\nc\u0301 界 🏳\ufe0f\u200d🌈 \u00a0é\u0639\u0631\u0628\u064a"
    assert printable(text + EVIL) == text


def test_a_name_from_a_file_does_not_control_the_terminal_either(run, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    values = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**values, f"a{EVIL}b": 1}))
    code, stdout, stderr = run("generate", copy, "Hi")
    assert (code, stdout) == (2, "") and "ab" in stderr and not set(stderr) & set(EVIL)


def test_no_color_is_obeyed_and_drafts_are_shown_all_the_same(run, folder, monkeypatch):
    on_terminal(monkeypatch, NO_COLOR="1")
    plain = run("generate", folder, "Hi", "--max-new-tokens", 6)[1]
    on_terminal(monkeypatch, NO_COLOR="")  # set to nothing is not set
    coloured = run("generate", folder, "Hi", "--max-new-tokens", 6)[1]
    assert "\033[33m" in coloured and "░" in plain
    assert plain == coloured.replace("\033[33m", "").replace("\033[0m", "")


def test_what_the_encoding_of_the_output_does_not_have_is_escaped(evil, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    assert main(["generate", str(evil), "Hi", "--temperature", "1", "--seed", "1"]) == 0
    assert b"\\u20" in output.buffer.getvalue()


# Ctrl-C


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C when the second block has begun: what the first one holds is final."""
    forward, seen = LLaDAModelLM.forward, []

    def forward_or_stop(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LLaDAModelLM, "forward", forward_or_stop)
    return seen


BLOCKS = ["--max-new-tokens", 8, "--block-length", 4, "--remasking-strategy", "low_confidence_static"]


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_ctrl_c_keeps_what_has_settled_and_ends_it_with_130(run, folder, interrupted, options):
    code, stdout, stderr = run("generate", folder, "Hi", *BLOCKS, *options)
    interrupted[:] = [1] * 10
    whole = run("generate", folder, "Hi", *BLOCKS)[1]
    assert (code, stdout) == (130, whole[: len("Hi") + 4] + "\n")
    assert "Traceback" not in stderr


def test_ctrl_c_keeps_no_part_of_several_completions_and_says_so(run, folder, interrupted):
    code, stdout, stderr = run("generate", folder, "Hi", *BLOCKS, "--num-return-sequences", 2)
    assert (code, stdout) == (130, "") and "nothing is kept" in stderr


def test_an_answer_that_is_stopped_stays_on_the_screen(run, chat_folder, interrupted, monkeypatch):
    say(monkeypatch, "Hi")
    code, stdout, stderr = run("chat", chat_folder, *BLOCKS)
    assert code == 0 and len(stdout) == 4 + 1 and "stopped" in stderr


# Text that is none


def test_bytes_that_are_no_utf_8_on_standard_input_are_one_line(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi \xff\xfe"), encoding="utf-8"))
    code, stdout, stderr = run("generate", "MODEL", "-")
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1
    assert "standard input is not UTF-8" in stderr and "iconv" in stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_nor_do_they_bring_a_conversation_down(run, chat_folder, monkeypatch, errors):
    text = io.TextIOWrapper(io.BytesIO(b"Hi \xff\xfe\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", text)
    code, stdout, stderr = run("chat", chat_folder)
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1 and "standard input is not UTF-8" in stderr


def test_a_prompt_that_is_no_utf_8_is_one_line(run):
    code, stdout, stderr = run("generate", "MODEL", os.fsdecode(b"Hi \xff"))
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1 and "PROMPT is not UTF-8" in stderr


def test_a_failure_while_decoding_is_one_line(run, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")

    monkeypatch.setattr(LLaDAModelLM, "forward", fail)
    code, stdout, stderr = run("generate", folder, "Hi")
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1
    assert f"decoding with {Path(folder)} failed: CUDA out of memory" in stderr
