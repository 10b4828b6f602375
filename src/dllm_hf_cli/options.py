"""The command line's options. Importing this module must stay cheap."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from .output import tell, write

COMMANDS = {
    "generate": "continue or infill a prompt",
    "chat": "converse",
    "batch": "decode a file of prompts into a file of results",
    "evaluate": "measure a model by tasks, into a result file",
    "serve": "answer requests over HTTP, as OpenAI's API does, and show a page",
    "warmup": "compile a model's kernels ahead of its first call",
    "export": "write a repository that runs without dllm_hf",
    "quantize": "write a repository with weights in 8 or 4 bits",
    "export-gguf": "write a model for llama.cpp",
    "export-edge": "write a file for ExecuTorch",
}

# Option of `DiffusionGenerationConfig` -> type, help, and the originals' names for it. The table is not made from
# `DiffusionGenerationConfig.DEFAULTS`, whose module imports torch and has no types; a test keeps the two equal.
# `return_dict_in_generate` is left out: it changes only what Python gets back.
GENERATION_OPTIONS: dict[str, tuple[type, str, tuple[str, ...]]] = {
    "max_new_tokens": (int, "positions to fill after the prompt; 0 only fills masks in the prompt", ("gen_length", "max_tokens")),
    "max_length": (int, "length of prompt and new tokens together", ()),
    "block_length": (int, "positions decoded together", ()),
    "small_block_size": (int, "Fast-dLLM v2: positions of a block decoded together, from left to right", ()),
    "use_block_cache": (bool, "Fast-dLLM v2: feed the sub-block alone once its first position is decided (approximate)", ()),
    "steps": (int, "denoising steps of the whole completion", ("max_steps",)),
    "denoising_steps": (int, "denoising steps of each block", ()),
    "draft_steps": (str, "so many further steps in each forward pass where their tokens are the same, or auto", ()),
    "self_speculation": (bool, "draft a block and keep what autoregressive decoding gives, where the model can (Nemotron)", ()),
    "temperature": (float, "0 proposes the most likely token", ("temperature_",)),
    "do_sample": (bool, "draw proposals, or (--no-do-sample) take the most likely ones", ()),
    "top_k": (int, "draw from the k most likely tokens", ("topk",)),
    "top_p": (float, "draw from the most likely tokens that reach this probability together", ("topp",)),
    "min_p": (float, "draw from the tokens whose probability is at least this fraction of the most likely one's", ()),
    "repetition_penalty": (float, "above 1: make tokens that the text already holds less likely", ()),
    "remasking_strategy": (
        str,
        "which proposals a step transfers: low_confidence_static (low_confidence), low_confidence_dynamic, sequential, "
        "entropy_bounded, factor, random, origin, maskgit_plus, topk_margin, entropy",
        ("remasking", "alg"),
    ),
    "confidence_threshold": (float, "low_confidence_dynamic transfers tokens of at least this confidence, in (0, 1]", ("threshold", "dynamic_threshold")),
    "entropy_bound": (float, "nats that entropy_bounded accepts in a step", ("eb_threshold",)),
    "factor": (float, "read by the strategy factor", ()),
    "editing_threshold": (float, "replace tokens of the block by proposals of a higher probability, where the model edits (LLaDA2)", ()),
    "max_post_steps": (int, "steps of editing after the last mask of a block is gone, at most", ()),
    "alg_temp": (float, "above 0: draw what is transferred from softmax(confidence / ALG_TEMP)", ()),
    "eps": (float, "last timestep of Dream's schedule", ()),
    "cfg_scale": (float, "classifier-free guidance; doubles the batch", ()),
    "cache_policy": (str, "none, prefix, dual or block, where the model offers it", ()),
    "cache_dtype": (str, "int8 or fp8 keeps keys and values in 8 bits, int8 nearer to what they were", ()),
    "prefill_chunk_size": (int, "cache policy block: a longer prompt is computed in pieces", ()),
    "suppress_tokens": (list, "token ids that are never proposed", ()),
    "bad_words_ids": (list, "words of one token each that are never proposed", ()),
    "stop_strings": (tuple, "end the text after the first of these that it holds", ()),
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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            meant = did_you_mean(value, action.choices)
            raise argparse.ArgumentError(
                action, f"{value!r} is unknown{meant}: choose one of {', '.join(action.choices)}"
            )

    def _print_message(self, message: str, file=None) -> None:
        write(message)  # help: errors, the other messages, are printed by `error`

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Arguments in any order, `--max_new_tokens` for `--max-new-tokens`."""
        end = argv.index("--") if "--" in argv else len(argv)
        hyphens = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv[:end]]
        arguments, unknown = self.parse_known_intermixed_args(hyphens + argv[end:])
        if unknown:
            names = (word.partition("=")[0] for word in unknown if word.startswith("-"))
            hint = next(filter(None, (did_you_mean(name, self._option_string_actions) for name in names)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return arguments


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known name is close: a wrong suggestion is worse than none."""
    # The leading hyphens would make all options alike.
    bare = {other.lstrip("-"): other for other in known}
    wanted = name.lstrip("-")
    longer = [other for other in bare if len(wanted) > 2 and other.startswith(wanted)]
    close = difflib.get_close_matches(wanted, bare, n=1, cutoff=0.75) or longer
    return f" (did you mean {bare[close[0]]}?)" if close else ""


def integer(text: str) -> int:
    """A type of argument: an integer of 64 bits, since torch takes no larger ones."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too large a number")
    return value


# Type in `GENERATION_OPTIONS` -> what `add_argument` is given.
ARGUMENT_OF_TYPE: dict[type, dict[str, Any]] = {
    int: {"type": integer, "metavar": "INT"},
    float: {"type": float, "metavar": "FLOAT"},
    str: {"metavar": "STR"},
    bool: {"action": argparse.BooleanOptionalAction},
    list: {"type": integer, "nargs": "+", "metavar": "ID"},
    tuple: {"nargs": "+", "metavar": "TEXT"},
}


class OneOf(argparse.Action):
    """An option with several names. A name may come again, as anywhere; two that differ contradict each other."""

    spelling = None

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        if self.spelling not in (None, option_string) and before != values:
            raise argparse.ArgumentError(
                None, f"{option_string} {values} contradicts {self.spelling} {before}: give only one of them"
            )
        self.spelling = option_string
        setattr(namespace, self.dest, values)


def command_parser(command: str) -> Parser:
    """The parser of one of `COMMANDS`."""
    parser = Parser(prog=f"dllm-hf {command}")
    if command == "export":
        _add_export_options(parser)
        return parser
    parser.add_argument("model", metavar="MODEL", help="a folder, or a repository of the Hugging Face Hub")
    if command == "export-gguf":
        _add_export_gguf_options(parser)
        return parser
    if command == "quantize":
        _add_quantize_options(parser)
        return parser
    if command == "export-edge":
        _add_export_edge_options(parser)
        return parser
    if command == "generate":
        parser.usage = f"{parser.prog} MODEL [PROMPT | -] [options]"
        parser.description = (
            "Continue a prompt, and fill the mask tokens in it. Prints prompt and completion; on a terminal, the drafts "
            "are shown while tokens become final. Ctrl-C ends it, and leaves the text that is final."
        )
        prompt_help = "text, or - for standard input (without its last newline)"
        parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help=prompt_help)
    elif command == "batch":
        _add_batch_options(parser)
    elif command == "serve":
        _add_serve_options(parser)
        return parser
    elif command == "warmup":
        parser.usage = f"{parser.prog} MODEL [options]"
        parser.description = (
            "Compile the kernels that decoding with a model launches on this GPU into Triton's cache (TRITON_CACHE_DIR), so that "
            "the first call need not. Kernels of keys and values in 8 bits and of drafts are others: give the options that calls "
            "are going to have. The weights are not read."
        )
        parser.add_argument("--block-length", type=integer, metavar="INT", help="default: the model's, or 32")
        for name in ("cache_dtype", "draft_steps"):
            kind, text, _ = GENERATION_OPTIONS[name]
            parser.add_argument("--" + name.replace("_", "-"), help=text, **ARGUMENT_OF_TYPE[kind])
        _add_model_options(parser)
        return parser
    elif command == "evaluate":
        _add_evaluate_options(parser)
        return parser
    else:
        parser.usage = f"{parser.prog} MODEL [options]"
        parser.description = "Converse with a model. /help lists its commands; Ctrl-C stops an answer, Ctrl-D quits."
    parser.epilog = (
        "Control characters and bidirectional formatting that a model writes are not shown on a terminal; a file or a "
        "pipe gets the text as it is. NO_COLOR is obeyed."
    )
    _add_decoding_options(parser)
    return parser


def _add_decoding_options(parser: Parser) -> None:
    _add_model_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--no-stream", action="store_true", help="show no drafts, only the final text")
    output.add_argument("--seed", type=integer, metavar="INT", help="makes random draws repeatable")
    _add_generation_options(parser)


def _add_model_options(parser: Parser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--device", help="cuda, cuda:1, cpu, mps, ... (default: cuda if there is one, else cpu)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    model.add_argument("--dtype", default="auto", choices=dtypes, help="default: the checkpoint's")
    model.add_argument("--trust-remote-code", action="store_true", help="run code that the repository brings")


def _add_generation_options(parser: Parser) -> None:
    generation = parser.add_argument_group(
        "generation", "Default: what the model's generation_config.json says, else the model's own default."
    )
    for name, (kind, text, other_names) in GENERATION_OPTIONS.items():
        spellings = dict.fromkeys("--" + each.rstrip("_").replace("_", "-") for each in (name, *other_names))
        action: dict[str, Any] = {"action": OneOf} if other_names else {}
        generation.add_argument(*spellings, dest=name, help=text, **ARGUMENT_OF_TYPE[kind], **action)


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `DiffusionGenerationConfig` that were given."""
    given = {name: value for name, value in vars(arguments).items() if name in GENERATION_OPTIONS and value is not None}
    if given.get("draft_steps", "").isdigit():  # the other value is "auto"
        given["draft_steps"] = int(given["draft_steps"])
    if "bad_words_ids" in given:
        given["bad_words_ids"] = [[token] for token in given["bad_words_ids"]]
    return given


def _add_batch_options(parser: Parser) -> None:
    parser.usage = f"{parser.prog} MODEL PROMPTS RESULTS [options]"
    parser.description = (
        "Decode many requests at once. A line of PROMPTS is a JSON object with `prompt`, `messages` (a chat) or "
        "`prompt_token_ids`; it may have an `id` and options of its own (`max_tokens`, `seed`, `stop`, `n`, ...). A line of "
        "RESULTS is written as soon as its request has finished. The same command goes on where a run was interrupted."
    )
    parser.add_argument("prompts", metavar="PROMPTS", help="a file of JSON lines")
    parser.add_argument("results", metavar="RESULTS", help="the file of JSON lines to write, or to go on with")
    _add_engine_options(parser, max_num_seqs=16)


def _add_evaluate_options(parser: Parser) -> None:
    parser.usage = f"{parser.prog} MODEL RESULTS --tasks TASK [TASK ...] [options]"
    parser.description = (
        "Measure a model, and write a file with the results and all that is needed to repeat them. A TASK is one of lm-eval's "
        "(`lm_eval ls tasks` lists them), or `infilling`: lines of HumanEval's solutions, for which programs that the model "
        'has written are run. Needs `pip install "dllm-hf[evaluation]"`.'
    )
    parser.add_argument("results", metavar="RESULTS", help="the JSON file to write; it must not exist")
    measure = parser.add_argument_group("measure")
    measure.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="one or more")
    measure.add_argument("--limit", type=integer, metavar="INT", help="only the first so many examples of each task")
    measure.add_argument("--num-fewshot", type=integer, metavar="INT", help="examples in the prompt")
    measure.add_argument("--apply-chat-template", action="store_true", help="make chats of the prompts")
    measure.add_argument("--include-path", metavar="FOLDER", help="with tasks of your own, as YAML files of lm-eval")
    measure.add_argument("--batch-size", type=integer, default=16, metavar="INT", help="texts at a time (default: 16)")
    measure.add_argument(
        "--num-samples", type=integer, default=128, metavar="INT", help="masks for a likelihood (default: 128)"
    )
    measure.add_argument("--seed", type=integer, default=0, metavar="INT", help="of all draws (default: 0)")
    measure.add_argument("--log-samples", action="store_true", help="put every prompt and answer into the file")
    measure.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="allow tasks of lm-eval that run what the model writes"
    )
    measure.add_argument(
        "--num-masks",
        type=integer,
        metavar="INT",
        help="infilling: masks in the place of a line, of which what follows an end token is cut (default: as many as the "
        "line has tokens)",
    )
    measure.add_argument(
        "--infilling-tokens",
        nargs=3,
        metavar="TEXT",
        help="infilling, for models whose blocks see earlier ones alone: what stands before the text before the line, before "
        "that behind it, and before the line (default: the model is given what stands before the line alone)",
    )
    measure.add_argument(
        "--infilling-order",
        choices=("psm", "spm"),
        help="infilling, with --infilling-tokens: psm is prefix, suffix, line (default), and spm suffix, prefix, line, where "
        "the line continues the prefix",
    )
    _add_model_options(parser)
    _add_generation_options(parser)
    parser.set_defaults(no_stream=True)


def _add_engine_options(parser: Parser, max_num_seqs: int) -> argparse._ArgumentGroup:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-num-seqs", type=integer, default=max_num_seqs, metavar="INT", help="completions at a time"
    )
    engine.add_argument("--max-model-len", type=integer, metavar="INT", help="columns of each: prompt and new tokens")
    engine.add_argument(
        "--max-num-batched-tokens",
        type=integer,
        default=2048,
        metavar="INT",
        help="columns of prompts and of whole canvases in a step",
    )
    engine.add_argument(
        "--tensor-parallel-size",
        type=integer,
        default=1,
        metavar="INT",
        help="GPUs that the model is divided between, with a process for each",
    )
    engine.add_argument(
        "--data-parallel-size",
        type=integer,
        default=1,
        metavar="INT",
        help="replicas of the model, each in a process and on a GPU of its own, with the above for each of them",
    )
    return engine


def _add_serve_options(parser: Parser) -> None:
    parser.usage = f"{parser.prog} MODEL [options]"
    parser.description = (
        "Answer requests over HTTP: OpenAI's chat and completions, infilling, and a page at /. SIGTERM and Ctrl-C let "
        "requests in flight finish. The options of decoding are those of requests that do not say otherwise."
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 listens at every address (default: this machine alone)"
    )
    server.add_argument("--port", type=integer, default=8000, metavar="INT", help="0 takes a free one")
    server.add_argument(
        "--api-key", metavar="KEY", help="what clients must send; better in DLLM_HF_API_KEY, which ps does not show"
    )
    server.add_argument("--served-model-name", metavar="NAME", help="default: MODEL")
    server.add_argument("--chat-template", metavar="FILE", help="instead of the tokenizer's")
    server.add_argument(
        "--allowed-origins", nargs="+", metavar="ORIGIN", help="sites whose pages may call the server (CORS)"
    )
    server.add_argument("--max-body-bytes", type=integer, default=4 * 2**20, metavar="INT", help="of a request")
    server.add_argument("--max-choices", type=integer, default=128, metavar="INT", help="completions of one request")
    server.add_argument(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="until a request ends with what is final",
    )
    server.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that requests in flight have at SIGTERM",
    )
    server.add_argument("--log-prompts", action="store_true", help="show prompts in the log")
    engine = _add_engine_options(parser, max_num_seqs=64)
    engine.add_argument("--max-queue", type=integer, default=1024, metavar="INT", help="completions that may wait")
    engine.add_argument(
        "--num-cache-tokens", type=integer, metavar="INT", help="columns of the cache, which completions share"
    )
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="FLOAT", help="part of the GPU that may be taken"
    )
    _add_model_options(parser)
    _add_generation_options(parser)
    parser.set_defaults(seed=None, no_stream=True)


def _add_export_options(parser: Parser) -> None:
    parser.description = (
        "Write a checkpoint, ours or an original, as a repository that runs without dllm_hf: weights, configuration, "
        "tokenizer, the code they need, and a card. The weights are linked or copied, not loaded."
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, or a repository of the Hugging Face Hub; or `custom_generate`, the denoising loop alone, for "
        "`generate(custom_generate=...)` of other models",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument("--config-only", action="store_true", help="without weights and tokenizer")
    parser.add_argument("--push", metavar="REPO", help="publish it on the Hub as well, under this name")
    parser.add_argument("--private", action="store_true", help="--push: a repository that others cannot see")


def _add_export_gguf_options(parser: Parser) -> None:
    parser.description = (
        "Write a model as a folder for llama.cpp: model.gguf, which holds the tokenizer too, and configurations. "
        'Needs `pip install "dllm-hf[llama-cpp]"`.'
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument(
        "--type", default="q8_0", choices=("f32", "f16", "q8_0", "q4_k_m"), help="of the weights (default: q8_0)"
    )


def _add_quantize_options(parser: Parser) -> None:
    parser.description = (
        "Write a checkpoint, ours or an original, with quantised weights, as a repository that loads wherever torchao is: "
        'weights, configuration, tokenizer, code and a card. Needs `pip install "dllm-hf[quantize]"`.'
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--weights",
        required=True,
        choices=("fp8", "int8", "int4"),
        help="fp8: and their inputs, on GPUs of compute capability 8.9; int8: anywhere; int4: on GPUs of 8.0",
    )
    parser.add_argument("--device", help="where weights are quantised (default: cuda if there is one, else cpu)")


def _add_export_edge_options(parser: Parser) -> None:
    parser.description = (
        "Write a LLaDA, Dream or SDAR as one .pte file for ExecuTorch, with configurations and tokenizer beside it: "
        "`dllm_hf.edge.DiffusionEdge` decodes with it, and so do programs without Python."
    )
    parser.add_argument(
        "out", metavar="OUT", help="a folder that does not exist, or the name of the file, ending in .pte"
    )
    precisions = ("none", "fp16", "int8", "int4")
    parser.add_argument("--quantization", choices=precisions, default="none", help="of the weights; none: float32")
    parser.add_argument(
        "--rows", type=integer, default=1, metavar="INT", help="the batch, all of which a pass computes"
    )
    parser.add_argument("--columns", type=integer, metavar="INT", help="prompt and new tokens (default: at most 512)")
    parser.add_argument(
        "--block-length", type=integer, metavar="INT", help="the longest block (default: the model's, or 32)"
    )
