"""The `dllm-hf` command.

It is a package beside `dllm_hf`, not in it: importing `dllm_hf` registers every model, which takes seconds. Help,
version and mistyped arguments need no model.
"""

import io
import os
import signal
import sys
from contextlib import contextmanager
from importlib import import_module

from .options import COMMANDS, Parser, command_parser
from .output import read_prompt, show, tell


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for what the user can correct; 130 after Ctrl-C; 141 when the reader of standard
    output has gone. `argparse` raises a `SystemExit` after help (0) and for wrong arguments (2)."""
    if sys.stderr is None:  # closed: `2>&-`
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        tell("dllm-hf: error: standard output is closed: there is nowhere to write to.")
        return 2
    # Characters that the output's encoding lacks are escaped; bytes that are not UTF-8 are refused when they are read.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, ImportError) as error:
        tell(f"dllm-hf: error: {error}")
        return 2


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="dllm-hf",
        description="Run masked-diffusion language models, and make repositories of them.",
        epilog="`dllm-hf COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument(
        "command",
        nargs="?",
        metavar="COMMAND",
        choices=COMMANDS,
        help="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()),
    )
    arguments = parser.parse(argv[:1])
    command = arguments.command
    if arguments.version:
        from importlib.metadata import version

        show(f"dllm-hf {version('dllm-hf')}")
    elif command is None:
        parser.print_help()
    else:
        options = command_parser(command).parse(argv[1:])
        if command == "generate":
            options.prompt = read_prompt(options.prompt)
        elif command == "evaluate":
            options.command_line = ["dllm-hf", *argv]
        with _exiting_at_ctrl_c():
            name = command.replace("-", "_")
            run = getattr(import_module(f".{name}", __name__), name)
        return run(options)
    return 0


@contextmanager
def _exiting_at_ctrl_c():
    """Ctrl-C ends the process at once while packages are imported: a half-imported package may turn the exception into
    another one, or print a message of its own. A process that ignores Ctrl-C goes on ignoring it."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
