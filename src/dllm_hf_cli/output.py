"""What the command reads and writes. Importing this module must stay cheap."""

import os
import sys
import unicodedata

# Bidirectional formatting reorders the characters around it, so that a line reads as something else than it is.
BIDIRECTIONAL = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """Text that cannot control a terminal: without control characters, line breaks and tabs excepted, and without
    bidirectional formatting."""
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or c in BIDIRECTIONAL))


def show(text: str) -> None:
    """Write a line to standard output: as it is into a file or a pipe, [`printable`] on a terminal."""
    write((printable(text) if sys.stdout.isatty() else text) + "\n")


def tell(text: str) -> None:
    """Write a line to standard error, which people read."""
    print(" ".join(printable(text).split()), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write to standard output at once, and as it is. Raises a `BrokenPipeError` when the reader has gone, and another
    `OSError` when the text cannot be written."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes standard output again at exit, and would report the same error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"standard output cannot be written to: {error.strerror}") from error


def read_prompt(argument: str) -> str:
    """The prompt that PROMPT stands for: `-` is standard input to its end, without its last newline."""
    if argument != "-":
        return utf8(argument, "PROMPT")
    if sys.stdin is None:
        raise ValueError("standard input is closed: give the text as an argument, or pipe it in.")
    return utf8(sys.stdin.read(), "standard input").removesuffix("\n")


def read_line(prompt: str) -> str | None:
    """The next line of standard input; None at its end. The prompt is shown on a terminal only."""
    if sys.stdin is None:
        return None
    is_terminal = sys.stdin.isatty()
    try:
        return utf8(input(prompt if is_terminal else ""), "standard input")
    except (EOFError, KeyboardInterrupt) as end:
        if is_terminal:
            print()  # the shell's prompt belongs on a line of its own
        if isinstance(end, KeyboardInterrupt):
            raise
        return None


def utf8(text: str, name: str) -> str:
    """`text`, which came from outside as `name`. Bytes that are not UTF-8 reach Python as lone surrogates, which no
    tokenizer takes: they are a `ValueError`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: convert it first, for example with `iconv -t UTF-8`.") from error
    return text
