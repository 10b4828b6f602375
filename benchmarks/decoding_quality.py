"""What parallel decoding and caches cost in quality: strategies, thresholds, quotas and cache policies side by side.

usage: decoding_quality.py measure CHECKPOINT ... --out results.jsonl [--text tinyshakespeare.txt] [--cache-dtype int8]
       decoding_quality.py report results.jsonl --docs docs

A Sudoku checkpoint solves 1,000 held-out puzzles at each of three levels; the share solved is counted. A text checkpoint
decodes held-out text, 192 characters after 64, with teacher forcing: where a step transfers a token, the true token is
written, and its negative log-probability under the model at that step is added to the loss. The strategy chooses the
positions from the model's own confidences. So the loss is that of the held-out text in the decoder's order and with its
parallelism: tokens transferred together count as independent.

With `--cache-dtype` every setting that keeps keys and values is one of a pair: with the model's type, and with this one. Puzzles
are solved greedily, and with three seeds of sampling; `same` is the share of cells that are as in the pair's first setting.

`measure` appends a JSON line for each setting; `report` writes the tables of docs/decoding_quality.md and its plots
(with matplotlib). docs/decoding_quality.jsonl holds the results of such runs.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  registers the models
from dllm_hf.generation.configuration import CACHE_DTYPES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from sudoku import MASK, generate  # noqa: E402

LEVELS = {"33-36 clues": (33, 36), "29-32 clues": (29, 32), "25-28 clues": (25, 28)}
HELD_OUT_SEED = 1  # of `sudoku.py generate`, for the puzzles that the training data leaves out
PROMPT, NEW = 64, 192
STATIC, DYNAMIC = "low_confidence_static", "low_confidence_dynamic"


def sudoku_settings(policies: tuple[str, ...]) -> list[dict]:
    settings = [{"remasking_strategy": STATIC, "steps": steps} for steps in (None, 24, 16, 12, 8, 4, 2, 1)]
    settings += [
        {"remasking_strategy": DYNAMIC, "confidence_threshold": threshold}
        for threshold in (0.9, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999)
    ]
    settings += [{"remasking_strategy": "entropy_bounded", "entropy_bound": bound} for bound in (0.001, 0.01, 0.1)]
    settings += [{"remasking_strategy": "factor", "factor": factor} for factor in (0.01, 0.1, 1.0)]
    settings += [{"remasking_strategy": name} for name in ("sequential", "random")]
    if "dual" in policies:  # in blocks of three rows, so that there is something before and after a block
        options = {"block_length": 27}
        for policy in ("none", "prefix", "dual"):
            options = {"block_length": 27, "cache_policy": policy}
            settings += [{"remasking_strategy": STATIC, **options}]
            settings += [{"remasking_strategy": DYNAMIC, "confidence_threshold": 0.999, **options}]
    return settings


def text_settings(policies: tuple[str, ...]) -> list[dict]:
    steps = [{"remasking_strategy": STATIC, "denoising_steps": number} for number in (32, 16, 8, 4, 2, 1)]
    thresholds = (0.3, 0.5, 0.7, 0.9, 0.98)
    dynamic = [{"remasking_strategy": DYNAMIC, "confidence_threshold": threshold} for threshold in thresholds]
    others = [{"remasking_strategy": name} for name in ("sequential", "random", "entropy", "topk_margin")]
    settings = [{**each, "cache_policy": policies[0]} for each in steps + dynamic + others]
    for policy in policies[1:]:
        # `block` gives the same as `none`: two settings are enough to show it.
        each_of = [steps[0], dynamic[3]] if policies[0] == "block" else steps + dynamic
        settings += [{**each, "cache_policy": policy} for each in each_of]
    return settings


def cache_settings(policies: tuple[str, ...], settings: list[dict], cache_dtype: str) -> list[dict]:
    """Each of the settings with each cache, in pairs: keys and values of the model's type, and of another one."""
    cached = [policy for policy in policies if policy != "none"]
    kinds = (None, cache_dtype)
    return [
        {**each, "cache_policy": policy, "cache_dtype": kind}
        for policy in cached
        for each in settings
        for kind in kinds
    ]


class TeacherForcing:
    """A `generation_logits_hook_func` that makes the true token each position's proposal, with the confidence of the
    model's own one, and sums the negative log-probabilities of the true tokens that are transferred.

    Args:
        truth: `(rows, length)`, the prompt included; rows are equally long.
        block: the block length, which divides the prompt.
    """

    def __init__(self, truth: torch.Tensor, mask_token_id: int, block: int):
        self.truth, self.mask, self.block = truth, mask_token_id, block
        self.losses = torch.zeros(truth.shape, device=truth.device)
        self.before: torch.Tensor | None = None
        self.total = torch.zeros((), dtype=torch.float64, device=truth.device)

    def __call__(self, step: int, sequences: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.add_transferred(sequences)
        self.before = sequences.clone()
        start = int((sequences == self.mask).any(0).nonzero()[0]) // self.block * self.block
        columns = slice(start, start + logits.shape[1])
        logits = logits.float().clone()
        logits[..., self.mask] = -math.inf
        truth = self.truth[:, columns, None]
        true = logits.gather(-1, truth)
        self.losses[:, columns] = (logits.logsumexp(-1, keepdim=True) - true).squeeze(-1)
        best, proposal = logits.max(-1, keepdim=True)
        # The logits of both tokens are swapped: the distribution, and with it every kind of confidence, stays the same.
        return logits.scatter(-1, proposal, true).scatter(-1, truth, best)

    def add_transferred(self, sequences: torch.Tensor) -> None:
        if self.before is not None:
            transferred = (self.before == self.mask) & (sequences != self.mask)
            self.total += self.losses[transferred].sum()


def measure_sudoku(model, tokenizer, args):
    """Yields a dict for each level and setting."""
    for level, clues in LEVELS.items():
        puzzles, grids = generate(1000, clues, torch.Generator().manual_seed(HELD_OUT_SEED))
        puzzles, grids = puzzles[: args.rows], grids[: args.rows]
        write = lambda row: "".join(map(str, row)).replace("0", MASK)
        ids, solutions = (
            torch.tensor(tokenizer([write(row) for row in part.tolist()]).input_ids, device=args.device)
            for part in (puzzles, grids)
        )
        settings, before = sudoku_settings(model.cache_policies), None
        if args.cache_dtype is not None:
            greedy = [{"remasking_strategy": STATIC}, {"remasking_strategy": DYNAMIC, "confidence_threshold": 0.9999}]
            sampled = [{"remasking_strategy": STATIC, "temperature": 1.0, "seed": seed} for seed in range(3)]
            # In blocks of three rows, so that something stands before and after a block.
            fixed = {"block_length": 27} if "dual" in model.cache_policies else {}
            pairs = [{**fixed, **each} for each in greedy + sampled]
            settings = cache_settings(model.cache_policies, pairs, args.cache_dtype)
        for setting in settings if level in args.levels else ():
            began = time.perf_counter()
            output = decode(model, ids, 0, setting)
            seconds = time.perf_counter() - began
            blanks = ids == tokenizer.mask_token_id
            right = output.sequences == solutions
            found = {"solved": right.all(1).float().mean().item(), "cells": right[blanks].float().mean().item()}
            if setting.get("cache_dtype") is not None:
                found["same"] = (output.sequences == before)[blanks].float().mean().item()
            before = output.sequences
            yield {"task": level, **setting, **found, **costs(output, blanks.sum(1), seconds)}


def measure_text(model, tokenizer, args):
    """Yields a dict for each setting."""
    text = args.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text[len(text) * 9 // 10 :], verbose=False).input_ids, device=args.device)
    windows = tokens[: len(tokens) // (PROMPT + NEW) * (PROMPT + NEW)].view(-1, PROMPT + NEW)[: args.rows]
    settings = text_settings(model.cache_policies)
    if args.cache_dtype is not None:
        pairs = [{"remasking_strategy": STATIC, "denoising_steps": number} for number in (32, 16)]
        pairs += [{"remasking_strategy": "sequential"}]  # in which no confidence decides the order
        settings = cache_settings(model.cache_policies, pairs, args.cache_dtype)
    for setting in settings:
        forcing = TeacherForcing(windows, tokenizer.mask_token_id, 32)
        began = time.perf_counter()
        output = decode(model, windows[:, :PROMPT], NEW, setting, generation_logits_hook_func=forcing)
        seconds = time.perf_counter() - began
        forcing.add_transferred(output.sequences)
        if not torch.equal(output.sequences, windows):
            raise RuntimeError(f"{setting}: the true text was not what was transferred.")
        loss = forcing.total.item() / (len(windows) * NEW)
        number = torch.full((len(windows),), NEW)
        yield {"task": "text", **setting, "loss": loss, **costs(output, number, seconds)}


def decode(model, ids: torch.Tensor, new_tokens: int, setting: dict, **kwargs):
    options = {name: value for name, value in setting.items() if value is not None}
    generator = torch.Generator(ids.device).manual_seed(options.pop("seed", 0))
    fixed = {"temperature": 0.0, "eos_token_id": [], "return_dict_in_generate": True, "generator": generator}
    # The threshold that the checkpoint recommends is meant for its own strategy.
    strategy = setting["remasking_strategy"]
    if strategy != DYNAMIC:
        fixed["confidence_threshold"] = 0.9
    return model.diffusion_generate(ids, max_new_tokens=new_tokens, **{**fixed, **options}, **kwargs)


def costs(output, tokens: torch.Tensor, seconds: float) -> dict:
    """Forward passes (NFE, the mean over rows), tokens per forward pass, and time."""
    passes = tokens.to(output.tokens_per_forward) / output.tokens_per_forward
    per_forward = tokens.sum().item() / passes.sum().item()
    return {"nfe": passes.mean().item(), "tokens_per_forward": per_forward, "seconds": seconds, "rows": len(tokens)}


def measure(args: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")  # TF32: the weights have fewer digits
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    for folder in args.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
        is_sudoku = tokenizer.mask_token == MASK
        if not is_sudoku and args.text is None:
            sys.exit(f"{folder} is a text checkpoint: --text must name the text that it was trained on.")
        run = {"checkpoint": folder.name, "device": device, "torch": torch.__version__}
        run |= {"transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"), "dtype": args.dtype}
        for found in (measure_sudoku if is_sudoku else measure_text)(model, tokenizer, args):
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**run, **found}) + "\n")
            print(describe(found), f"{folder.name}", found.get("solved", found.get("loss")), f"NFE {found['nfe']:.2f}")


def describe(row: dict) -> str:
    """A setting in a few words."""
    names = {"steps": "steps", "denoising_steps": "steps a block", "confidence_threshold": "threshold"}
    names |= {"entropy_bound": "bound", "factor": "factor", "block_length": "blocks of", "cache_policy": "cache"}
    names |= {"temperature": "temperature", "seed": "seed", "cache_dtype": "keys and values"}
    parts = [f"{names[key]} {row[key]}" for key in names if row.get(key) is not None]
    return ", ".join([f"`{row['remasking_strategy']}`", *parts])


def report(args: argparse.Namespace) -> None:
    """Replaces what follows the marker in decoding_quality.md; what stands before it is written by hand."""
    rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    sudoku = [name for name in checkpoints if any(row["checkpoint"] == name and "solved" in row for row in rows)]
    text = [name for name in checkpoints if name not in sudoku]
    plot(rows, sudoku, text, args.docs)
    lines = [MARKER, ""]
    for where, names in (("sudoku", sudoku), ("text", text)):
        if names:
            lines += [f"![quality against forward passes](decoding_quality_{where}.png)", ""]
    for name in sudoku:
        own = [row for row in rows if row["checkpoint"] == name]
        lines += [f"## {name}", "", machine(own), ""]
        lines += [
            f"Solved, forward passes, tokens a pass{seconds_of(own)}:",
            "",
            "| setting | " + " | ".join(LEVELS) + " |",
        ]
        lines += ["|---" * (1 + len(LEVELS)) + "|"]
        for setting in dict.fromkeys(map(describe, own)):
            cells = []
            for level in LEVELS:
                row = next((r for r in own if describe(r) == setting and r["task"] == level), None)
                cells.append("" if row is None else f"{100 * row['solved']:.1f}%, {cost(row)}")
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
        lines.append("")
    for name in text:
        own = [row for row in rows if row["checkpoint"] == name]
        lines += [f"## {name}", "", machine(own), ""]
        lines += [f"| setting | nats a character, forward passes, tokens a pass{seconds_of(own)} |", "|---|---|"]
        lines += [f"| {describe(row)} | {row['loss']:.3f}, {cost(row)} |" for row in own] + [""]
    path = args.docs / "decoding_quality.md"
    before = path.read_text(encoding="utf-8").partition(MARKER)[0] if path.is_file() else ""
    path.write_text(before + "\n".join(lines), encoding="utf-8")


MARKER = "<!-- written by `benchmarks/decoding_quality.py report` from here on -->"


def seconds_of(rows: list[dict]) -> str:
    """Said of a GPU only: an absolute time on a shared CPU is worth nothing."""
    return "" if rows[0]["device"] == "CPU" else ", seconds of all rows in one batch"


def machine(rows: list[dict]) -> str:
    versions = sorted({(row["device"], row["torch"], row["transformers"], row["date"], row["rows"]) for row in rows})
    return "; ".join(f"{n} rows on {d}, torch {t}, transformers {v}, {day}" for d, t, v, day, n in versions) + "."


def cost(row: dict) -> str:
    seconds = "" if row["device"] == "CPU" else f", {row['seconds']:.1f}"
    return f"{row['nfe']:.1f}, {row['tokens_per_forward']:.1f}{seconds}"


def plot(rows: list[dict], sudoku: list[str], text: list[str], docs: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("The plots need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    markers = {STATIC: "o", DYNAMIC: "s", "entropy_bounded": "^", "factor": "v", "sequential": "x", "random": "+"}
    dashes = {"prefix": "--", "dual": ":"}
    for names, value, label, file in (
        (sudoku, "solved", "puzzles of 33 to 36 clues solved", "decoding_quality_sudoku.png"),
        (text, "loss", "nats a character", "decoding_quality_text.png"),
    ):
        if not names:
            continue
        figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), sharey=True, squeeze=False)
        for axis, name in zip(axes[0], names):
            own = [row for row in rows if row["checkpoint"] == name and row["task"] in (next(iter(LEVELS)), "text")]
            own = [row for row in own if row.get("block_length") is None]
            strategies = list(dict.fromkeys(row["remasking_strategy"] for row in own))
            for policy in dict.fromkeys(row.get("cache_policy") for row in own):
                for colour, strategy in enumerate(strategies):
                    points = [
                        (row["nfe"], row[value])
                        for row in own
                        if row["remasking_strategy"] == strategy and row.get("cache_policy") == policy
                    ]
                    if points:
                        title = strategy if policy is None else f"{strategy}, {policy}"
                        style = {"marker": markers.get(strategy, "d"), "linestyle": dashes.get(policy, "-")}
                        axis.plot(*zip(*sorted(points)), color=f"C{colour}", label=title, markersize=4, **style)
            axis.set(title=name, xlabel="forward passes", xscale="log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
        axes[0][0].set_ylabel(label)
        figure.tight_layout()
        figure.savefig(docs / file, dpi=110)
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="decode with each setting")
    measuring.add_argument("checkpoints", nargs="+", type=Path)
    measuring.add_argument("--out", type=Path, required=True, help="a .jsonl file, which is appended to")
    measuring.add_argument("--text", type=Path, help="the training text; its last tenth is held out")
    measuring.add_argument("--rows", type=int, default=1000, help="puzzles of a level, or windows of text, at most")
    measuring.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="compare it with keys and values of the model's type"
    )
    measuring.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="of puzzles")
    measuring.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    measuring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measuring.set_defaults(run=measure)
    reporting = commands.add_parser("report", help="write tables and plots")
    reporting.add_argument("results", type=Path)
    reporting.add_argument("--docs", type=Path, required=True)
    reporting.set_defaults(run=report)
    args = parser.parse_args(argv)
    missing = [
        path for path in [*getattr(args, "checkpoints", []), getattr(args, "text", None)] if path and not path.exists()
    ]
    if missing:
        parser.error(f"{missing[0]} does not exist.")
    args.run(args)


if __name__ == "__main__":
    main()
