"""What the command reads and writes. Importing this must stay cheap."""

import os
import sys
import unicodedata

# They reorder what stands around them, so that a line reads as something else than it is.
BIDIRECTIONAL = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


class OutputError(OSError):
    """Standard output takes nothing more."""


def printable(text: str) -> str:
    """Text that cannot control a terminal: without control characters, line breaks and tabs excepted, and without
    bidirectional formatting."""
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or c in BIDIRECTIONAL))


def show(text: str, end: str = "\n") -> None:
    """Write to standard output: as it is into a file or a pipe, [`printable`] on a terminal."""
    write((printable(text) if sys.stdout.isatty() else text) + end)


def tell(text: str) -> None:
    """Write a line to standard error, which people read."""
    print(" ".join(printable(text).split()), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write to standard output at once, and as it is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output cannot be written to: {error.strerror}") from error


def discard_output() -> None:
    """Python flushes standard output once more on its way out, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_input() -> str:
    """Standard input to its end."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: give the text as an argument, or pipe it in.")
    try:
        return utf8(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise _not_utf8("standard input") from error


def read_line(prompt: str) -> str:
    """The next line of standard input with its line break; nothing at its end. Who types is shown a prompt."""
    if sys.stdin is None:
        return ""
    typed = sys.stdin.isatty()
    try:
        return utf8(input(prompt if typed else ""), "what was typed" if typed else "standard input") + "\n"
    except UnicodeDecodeError as error:
        raise _not_utf8("standard input") from error
    except (EOFError, KeyboardInterrupt) as end:
        if typed:
            print()  # the shell's prompt belongs on a line of its own
        if isinstance(end, KeyboardInterrupt):
            raise
        return ""


def utf8(text: str, name: str) -> str:
    """`text`, which came from outside as `name`. Bytes that are no UTF-8 reach Python as lone surrogates, which no
    tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(name) from error
    return text


def _not_utf8(name: str) -> ValueError:
    return ValueError(f"{name} is not UTF-8 text: convert it first, for example with `iconv -t UTF-8`.")
