"""What `adapt.py` measures: held-out text in nats a token, lines of HumanEval filled in, and the report of both."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapt_data import END, PREFIX, SUFFIX, WINDOW, read_stream
from torch.nn import functional as F

from dllm_hf.evaluation.human_eval import problems_sha256, tasks
from dllm_hf.evaluation.infilling import InPlace, LeftToRight
from dllm_hf.evaluation.infilling import evaluate as fill_in

THRESHOLDS = (None, 0.95, 0.9, 0.8, 0.7, 0.5)  # None: one token a step
NUM_MASKS = 48
NEXT_TOKEN = ", next token"
HELD_OUT = {
    "held_out": "files held out",
    "repository": "this repository's source",
    "stdlib": "Python's standard library",
}
# Of files held out: the nats of tokens that have so many before them say how far back a model reads.
PLACES = {
    f"nats by place, {first} to {end - 1}": (first, end) for first, end in ((8, 64), (64, 128), (128, 256), (256, 512))
}


def evaluate(model, tokenizer, folder: Path, args, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure what is not in the arm's results yet. `args`: of `adapt.py evaluate`. `write`: takes a line of the results."""
    known = {line["measure"] for line in read_lines(folder / "results" / f"{args.arm}.jsonl")}
    names: list[str] = []

    def is_due(name: str) -> bool:
        names.append(name)
        is_asked = name.startswith(args.only or "")
        if is_asked and name in known:
            print(f"{name}: in the results already, not measured again")
        return is_asked and name not in known

    bits = f", {args.weights} weights" if args.weights else ""
    kinds = ["", NEXT_TOKEN] if getattr(model, "causal_context", False) else [""]
    texts = [(f"nats {each}{kind}", each, kind, (1, WINDOW)) for each, kind in itertools.product(HELD_OUT, kinds)]
    for name, split, kind, place in [*texts, *((name, "held_out", "", place) for name, place in PLACES.items())]:
        name += bits
        if is_due(name):
            stream = read_stream(folder / "data", split)
            if len(stream) < WINDOW:
                print(f"{name}: left out, the text has {len(stream)} tokens, less than one window of {WINDOW}")
                continue
            write({"measure": name, **held_out(model, stream, args.windows, args.samples, kind == NEXT_TOKEN, place)})
    every = tasks()[: args.tasks]
    if args.cache_dtype:
        bits += f", {args.cache_dtype} cache"
    for name, form, options in settings(model):
        name += bits
        if args.cache_dtype:
            if options.get("cache_policy", "none") == "none":
                continue
            options = {**options, "cache_dtype": args.cache_dtype}
        if not is_due(name):
            continue
        run = {"end_token_ids": [END], "batch_size": args.batch, "workers": args.workers}
        began = time.monotonic()
        result = fill_in(model, tokenizer, form, every, **run, **options)
        line = {"measure": name, **{key: value for key, value in result.to_dict().items() if key != "completions"}}
        line |= {"seconds": round(time.monotonic() - began, 1), "problems_sha256": problems_sha256()}
        write({**line, "lines": [[x.id, x.passed, x.line] for x in result.completions]})
        print(
            f"{name}: {100 * result.pass_at_1:.1f}% of {len(every)} pass, {result.tokens_per_forward:.2f} tokens a pass"
        )
    if not any(name.startswith(args.only or "") for name in names):
        raise SystemExit(f"--only {args.only!r}: no measure's name begins so. There are:\n" + "\n".join(names))


def settings(model) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, format and options of each measure of a model on HumanEval."""
    is_diffusion = hasattr(model, "diffusion_generate")
    one = {"remasking_strategy": "low_confidence_static"} if is_diffusion else {}
    yield "left to right", LeftToRight(), one
    if is_diffusion and not model.sees_earlier_blocks:
        yield "in place, true length", InPlace(), one
        name, form = f"in place, {NUM_MASKS} masks", InPlace(NUM_MASKS)
        # Else the model is sure of the line's end before it is of the line.
        yield f"{name}, end tokens last", form, {**one, "cache_policy": "dual", "confidence_suppress_tokens": [END]}
    else:
        name = "suffix and prefix"
        form = LeftToRight([PREFIX], [SUFFIX], suffix_first=True, max_new_tokens=NUM_MASKS)
    if not is_diffusion:
        yield name, form, one
        return
    if model.causal_context:
        yield f"{name}, self-speculation", form, {"self_speculation": True}
    for policy in model.cache_policies:
        for threshold in THRESHOLDS:
            options = {"cache_policy": policy, **one}
            if threshold is not None:
                options |= {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": threshold}
            yield f"{name}, cache {policy}, {threshold or 'one token a step'}", form, options


def held_out(
    model,
    stream: np.ndarray,
    number: int,
    samples: int,
    is_causal: bool = False,
    place: tuple[int, int] = (1, WINDOW),
) -> dict[str, Any]:
    """Nats a token of windows from all over a text.

    Args:
        is_causal: of the next token, by a model of diffusion that learnt it too.
        place: the first token of a window that counts, those before it are given, and the end.
    """
    windows = stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)
    number = min(number, len(windows))
    rows = torch.from_numpy(windows[np.linspace(0, len(windows) - 1, number).astype(int), : place[1]].astype(np.int64))
    if is_causal or not hasattr(model, "log_likelihood"):
        options = {"use_causal_mask": True} if is_causal else {}
        losses = [next_token_losses(model, row[None].to(model.device), **options) for row in rows]
        return {
            "windows": number,
            "nats": torch.stack(losses)[:, place[0] - 1 :].mean().item(),
            "is": "the text's, each token given all before it",
        }
    labels = rows.clone()
    labels[:, : place[0]] = -100
    found = model.log_likelihood(rows.to(model.device), labels=labels.to(model.device), num_samples=samples)
    total = found.num_tokens.sum()
    block = model.config.block_size if model.sees_earlier_blocks else WINDOW
    return {
        "windows": number,
        "nats": (-found.log_likelihood.sum() / total).item(),
        "standard_error": (found.standard_error.square().sum().sqrt() / total).item(),
        "samples": samples,
        "is": f"a bound on the text's, over random orders in each {block} tokens",
    }


@torch.no_grad()
def next_token_losses(model, row: torch.Tensor, **options) -> torch.Tensor:
    """`(length - 1,)`, of a causal model."""
    return F.cross_entropy(model(row, **options).logits[0, :-1].float(), row[0, 1:], reduction="none").double().cpu()


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(json.loads(line))
            found[-1]["measure"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number}, is damaged: remove the line, and it is measured again."
            ) from error
    return found


def report(folder: Path) -> None:
    """Print the tables, and draw `plot.svg` where matplotlib is installed."""
    arms = {path.stem: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    if all(line["measure"] in ("training", "alignment") for lines in arms.values() for line in lines):
        raise SystemExit(f"{folder} holds no measures yet: run `adapt.py evaluate` first.")
    print(f"| arm | {' | '.join(HELD_OUT.values())} | what it is |\n|---|---|---|---|---|")
    for (arm, lines), kind in itertools.product(arms.items(), ("", NEXT_TOKEN)):
        found = {line["measure"]: line for line in lines}
        nats = [found.get(f"nats {split}{kind}") for split in HELD_OUT]
        if any(nats):
            numbers = " | ".join("" if each is None else f"{each['nats']:.3f}" for each in nats)
            print(f"| {arm}{kind} | {numbers} | {next(filter(None, nats))['is']} |")
    if any(line["measure"] in PLACES for lines in arms.values() for line in lines):
        print("\n| nats held out, tokens before | " + " | ".join(name.partition(", ")[2] for name in PLACES) + " |")
        print("|---" * (1 + len(PLACES)) + "|")
    for arm, lines in arms.items():
        found = {line["measure"]: f"{line['nats']:.3f}" for line in lines if line["measure"] in PLACES}
        if found:
            print(f"| {arm} | {' | '.join(found.get(name, '') for name in PLACES)} |")
    print(
        "\n| arm | measure | pass@1, % (standard error) | exact match, % | tokens a pass | of the line | tasks |\n"
        + "|---" * 7
        + "|"
    )
    for arm, lines in arms.items():
        for line in lines:
            if "pass_at_1" in line:
                rate = f"{100 * line['pass_at_1']:.1f} ({100 * line['standard_error']:.1f}) | {100 * line['exact_match']:.1f}"
                passes = f"{line['tokens_per_forward']:.2f} | {line['line_tokens_per_forward']:.2f}"
                print(f"| {arm} | {line['measure']} | {rate} | {passes} | {line['num_tasks']} |")
    draw(arms, folder / "plot.svg")


def draw(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Tokens a forward pass against the rate of tasks passed, a line for each arm and cache policy, of the models' own types."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("\nNo plot: matplotlib is not installed.")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for arm, lines in arms.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for line in lines:
            if "pass_at_1" in line:
                form, *parts = line["measure"].split(", ")
                if any(each.endswith((" cache", " weights")) for each in parts):
                    continue
                parts = [each for each in parts if each.startswith(("cache ", "self-"))]
                if parts or form == "suffix and prefix":
                    points = curves.setdefault(", ".join([arm, *parts]), [])
                    points.append((line["tokens_per_forward"], 100 * line["pass_at_1"]))
        for name, points in curves.items():
            # After ten lines colours begin again.
            axes.plot(*zip(*sorted(points)), marker="os^D"[len(axes.lines) // 10 % 4], label=name)
    if not axes.lines:
        print("\nNo plot: no lines were filled in between prefix and suffix yet.")
        return
    axes.set(xlabel="tokens a forward pass", ylabel="tasks passed, %", title="HumanEval, one line filled in")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, bbox_inches="tight")
    print(f"\n{path}")
