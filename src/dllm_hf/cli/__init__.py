"""The `dllm-hf` command. A model is read once the arguments are known to be right."""

import os
import sys
from importlib.metadata import version

from .options import Parser, add_options, export_parser, parse


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has gone. Python would flush once more on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"dllm-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
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
        choices=["generate", "chat", "export"],
        help="continue or infill a prompt; converse; write a repository that runs without dllm_hf",
    )
    arguments = parser.parse_args(argv[:1])
    if arguments.version:
        print(f"dllm-hf {version('dllm-hf')}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0

    if arguments.command == "export":
        options = export_parser().parse_args(argv[1:])
        from .export import export

        return export(options)

    positionals = "MODEL [PROMPT | -]" if arguments.command == "generate" else "MODEL"
    prog = f"dllm-hf {arguments.command}"
    parser = Parser(prog=prog, usage=f"{prog} {positionals} [options]", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a folder, or a repository of the Hugging Face Hub")
    if arguments.command == "generate":
        parser.description = (
            "Continue a prompt, and fill the mask tokens written in it. Prints prompt and completion; in a terminal, "
            "the drafts are visible while they settle."
        )
        parser.add_argument(
            "prompt",
            metavar="PROMPT",
            nargs="?",
            default="",
            help="text, or - for standard input (less its last newline)",
        )
    else:
        parser.description = (
            "Converse with a model. /clear forgets the conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer."
        )
    add_options(parser)
    options = parse(parser, argv[1:])
    if arguments.command == "generate":
        from .generate import generate as run
    else:
        from .chat import chat as run
    return run(options)
