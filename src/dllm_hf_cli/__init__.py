"""The `dllm-hf` command.

It stands beside the package `dllm_hf`, not in it: importing that registers every model, which takes seconds. Help,
version and mistyped arguments need none of it.
"""

import os
import signal
import sys
import threading
from contextlib import contextmanager

from .options import COMMANDS, Parser, command_parser, export_parser, one_of
from .output import OutputError, discard_output, read_input, show, tell, utf8


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C, 141 when the reader has gone."""
    if sys.stderr is None:  # closed: `2>&-`
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        tell("dllm-hf: error: standard output is closed: there is nowhere to write to.")
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        # What its encoding does not have is better shown in another way than not at all.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # help was given, or what is wrong with the arguments was said
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_output()
        return 141
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, OutputError):
            discard_output()
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
        type=one_of(*COMMANDS),
        help="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()),
    )
    arguments = parser.parse(argv[:1])
    if arguments.version:
        from importlib.metadata import version

        show(f"dllm-hf {version('dllm-hf')}")
    elif arguments.command is None:
        parser.print_help()
    else:
        return _run_command(arguments.command, argv[1:])
    return 0


def _run_command(command: str, argv: list[str]) -> int:
    if command == "export":
        options = export_parser().parse(argv)
        with _leaving_at_once():
            from .export import export as run
    else:
        options = command_parser(command).parse(argv)
        if command == "generate":
            options.prompt = (
                read_input().removesuffix("\n") if options.prompt == "-" else utf8(options.prompt, "PROMPT")
            )
        with _leaving_at_once():
            if command == "generate":
                from .generate import generate as run
            else:
                from .chat import chat as run
    return run(options)


@contextmanager
def _leaving_at_once():
    """For imports, where Ctrl-C has nothing to put in order. A package that is half imported may turn the exception into
    another, or into a message of its own."""
    is_python_s = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not is_python_s:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
