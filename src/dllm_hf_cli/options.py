"""The command line's options. Importing this must stay cheap."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import NoReturn

from .output import tell, write

COMMANDS = {
    "generate": "continue or infill a prompt",
    "chat": "converse",
    "export": "write a repository that runs without dllm_hf",
}

# Option of `DiffusionGenerationConfig` -> type, help, and the originals' names for it. Written out instead of being read
# from `DEFAULTS`, whose module needs torch, and which mostly says None; a test keeps the two in step.
# `return_dict_in_generate` is missing: it is about what Python gets back.
GENERATION_OPTIONS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "max_new_tokens": (int, "positions to fill after the prompt; 0 only fills masks in the prompt", ("gen_length", "max_tokens")),
    "max_length": (int, "length of prompt and new tokens together", ()),
    "block_length": (int, "positions decoded together", ()),
    "steps": (int, "denoising steps of the whole completion", ("max_steps",)),
    "denoising_steps": (int, "denoising steps of each block", ()),
    "temperature": (float, "0 proposes the most likely token", ("temperature_",)),
    "do_sample": (bool, "draw proposals, or (--no-do-sample) take the most likely ones", ()),
    "top_k": (int, "draw from the k most likely tokens", ("topk",)),
    "top_p": (float, "draw from the most likely tokens that reach this probability together", ("topp",)),
    "min_p": (float, "draw from the tokens that are at least so probable, as a part of the most likely one", ()),
    "repetition_penalty": (float, "above 1: make tokens that stand in the text already less likely", ()),
    "remasking_strategy": (
        str,
        "which proposals a step transfers: low_confidence_static (low_confidence), low_confidence_dynamic, sequential, "
        "entropy_bounded, factor, random, origin, maskgit_plus, topk_margin, entropy",
        ("remasking", "alg"),
    ),
    "confidence_threshold": (float, "what low_confidence_dynamic asks of a token, in (0, 1]", ("threshold", "dynamic_threshold")),
    "entropy_bound": (float, "nats that entropy_bounded accepts in a step", ("eb_threshold",)),
    "factor": (float, "read by the strategy factor", ()),
    "alg_temp": (float, "above 0: draw what is transferred from softmax(confidence / ALG_TEMP)", ()),
    "eps": (float, "last timestep of Dream's schedule", ()),
    "cfg_scale": (float, "classifier-free guidance; doubles the batch", ()),
    "cache_policy": (str, "none, prefix, dual or block, where the model offers it", ()),
    "prefill_chunk_size": (int, "cache policy block: a longer prompt is computed in pieces", ()),
    "suppress_tokens": (list, "token ids that are never proposed", ()),
    "bad_words_ids": (list, "words of one token each that are never proposed either", ()),
    "stop_strings": (tuple, "end the text behind the first of these", ()),
    "max_time": (float, "seconds after which the text ends with the block that is being decoded", ()),
    "confidence_suppress_tokens": (list, "token ids that are transferred last", ()),
    "logits_eos_inf": (bool, "never propose the end of sequence", ()),
    "confidence_eos_eot_inf": (bool, "transfer the ends of sequence and of turn last", ()),
    "num_return_sequences": (int, "completions of the prompt; more than one are not streamed", ()),
    "check_interval": (int, "check only every so many steps whether a block is done", ("steps_per_look",)),
    "disable_compile": (bool, "no CUDA graphs and no fused kernels", ()),
    "torch_compile": (bool, "on a GPU, compile the forward pass of a step, which takes half a minute or more", ()),
    "output_history": (bool, "show the text after each step, one line each, on stderr", ()),
    "mask_token_id": (int, "instead of the model's own", ("mask_id",)),
    "pad_token_id": (int, "instead of the model's own", ()),
    "bos_token_id": (int, "instead of the model's own", ()),
    "eos_token_id": (list, "one or more, instead of the model's own", ()),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Errors are one line, and suggest what may have been meant."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        tell(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2)

    def _print_message(self, message: str, file=None) -> None:
        write(message)  # help: the only thing that is printed besides errors

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Arguments in any order, `--max_new_tokens` for `--max-new-tokens`."""
        end = argv.index("--") if "--" in argv else len(argv)
        hyphens = []
        for argument in argv[:end]:
            name, equals, value = argument.partition("=")
            hyphens.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
        arguments, unknown = self.parse_known_intermixed_args(hyphens + argv[end:])
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            names = (argument.partition("=")[0] for argument in unknown if argument.startswith("-"))
            hint = next(filter(None, (did_you_mean(name, known) for name in names)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return arguments


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known name is close: a wrong suggestion is worse than none."""
    # Hyphens would make all options alike.
    bare = {other.lstrip("-"): other for other in known}
    wanted = name.lstrip("-")
    longer = [other for other in bare if len(wanted) > 2 and other.startswith(wanted)]
    close = difflib.get_close_matches(wanted, bare, n=1, cutoff=0.75) or longer
    return f" (did you mean {bare[close[0]]}?)" if close else ""


def one_of(*values: str) -> Callable[[str], str]:
    """A type of argument."""

    def check(text: str) -> str:
        if text not in values:
            meant = did_you_mean(text, values)
            raise argparse.ArgumentTypeError(f"{text!r} is unknown{meant}: choose one of {', '.join(values)}")
        return text

    return check


def integer(text: str) -> int:
    """A type of argument: what fits into 64 bits, as everything does that counts something."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large a number")
    return value


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def command_parser(command: str) -> Parser:
    """The parser of `generate` or `chat`."""
    prog = f"dllm-hf {command}"
    positionals = "MODEL [PROMPT | -]" if command == "generate" else "MODEL"
    parser = Parser(prog=prog, usage=f"{prog} {positionals} [options]")
    parser.add_argument("model", metavar="MODEL", help="a folder, or a repository of the Hugging Face Hub")
    if command == "generate":
        parser.description = (
            "Continue a prompt, and fill the mask tokens written in it. Prints prompt and completion; in a terminal, "
            "the drafts are visible while they settle. Ctrl-C ends it, and leaves what has settled."
        )
        parser.add_argument(
            "prompt",
            metavar="PROMPT",
            nargs="?",
            default="",
            help="text, or - for standard input (less its last newline)",
        )
    else:
        parser.description = "Converse with a model. /help lists its commands; Ctrl-C stops an answer, Ctrl-D quits."
    parser.epilog = (
        "A terminal is shown no control characters and no bidirectional formatting that a model writes; a file or a pipe "
        "gets the text as it is. NO_COLOR is obeyed."
    )
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--device", help="cuda, cuda:1, cpu, mps, ... (default: cuda if there is one, else cpu)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    model.add_argument(
        "--dtype", default="auto", type=one_of(*dtypes), help=f"{', '.join(dtypes)} (default: the checkpoint's)"
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code that the repository brings")
    output = parser.add_argument_group("output")
    output.add_argument("--no-stream", action="store_true", help="show no drafts, only the final text")
    output.add_argument("--seed", type=integer, metavar="INT", help="makes random draws repeatable")

    generation = parser.add_argument_group(
        "generation", "Where one is not given, the model's generation_config.json and then the model's default apply."
    )
    for name, (kind, text, other_names) in GENERATION_OPTIONS.items():
        names = [flag(n) for n in dict.fromkeys(n.rstrip("_") for n in (name, *other_names))]
        if kind is bool:
            generation.add_argument(*names, dest=name, help=text, action=argparse.BooleanOptionalAction)
        elif kind is list:
            generation.add_argument(*names, dest=name, help=text, type=integer, nargs="+", metavar="ID")
        elif kind is tuple:
            generation.add_argument(*names, dest=name, help=text, nargs="+", metavar="TEXT")
        else:
            convert = integer if kind is int else kind
            generation.add_argument(*names, dest=name, help=text, type=convert, metavar=kind.__name__.upper())


def generation_options(arguments: argparse.Namespace) -> dict:
    """Those that were given."""
    given = {name: value for name, value in vars(arguments).items() if name in GENERATION_OPTIONS and value is not None}
    if "bad_words_ids" in given:
        given["bad_words_ids"] = [[token] for token in given["bad_words_ids"]]
    return given


def export_parser() -> Parser:
    """The parser of `export`."""
    parser = Parser(
        prog="dllm-hf export",
        description="Write a checkpoint, ours or an original, as a repository that runs without dllm_hf: weights, "
        "configuration, tokenizer, the code they need, and a card. The weights are linked or copied, not loaded.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, or a repository of the Hugging Face Hub; or `custom_generate`, the "
        "denoising loop alone, for `generate(custom_generate=...)` of other models",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--config-only", action="store_true", help="without weights and tokenizer")
    parser.add_argument("--push", metavar="REPO", help="publish it on the Hub as well, under this name")
    parser.add_argument("--private", action="store_true", help="--push: a repository that others cannot see")
    return parser
