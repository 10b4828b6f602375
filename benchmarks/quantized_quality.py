"""What weights in 8 and 4 bits, and keys and values in 8, cost in quality, on the trained checkpoints of hub_configs.

usage: quantized_quality.py CHECKPOINT ... [--formats int8] [--text tinyshakespeare.txt] [--out results.jsonl]
       quantized_quality.py SUDOKU_CHECKPOINT ... --formats --caches int8 fp8 [--cache-policy dual --block-length 27]

A Sudoku checkpoint solves held-out puzzles, with the options that its generation_config.json recommends: greedily, and with
proposals drawn at temperature 1 from three seeds. Of the greedy ones it is counted how many only one of the two solves. A text
checkpoint gives the bound on the negative log-likelihood of the held-out tenth of the text (`examples/shakespeare.py`, with the
same noise for each format). On a GPU with bf16, fp8, int8 and int4 in groups of 32, since the checkpoints' layers are narrow;
on a CPU with float32 and int8, or with bf16 beside fp8, which torchao would quantise on a GPU alone, by its tensors.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  registers the models
from dllm_hf.generation.configuration import CACHE_DTYPES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from decoding_quality import HELD_OUT_SEED, LEVELS  # noqa: E402
from shakespeare import held_out, negative_evidence_bound  # noqa: E402
from sudoku import MASK, generate  # noqa: E402


def load(folder: Path, weights: str, args: argparse.Namespace):
    """A model whose layers and head are quantised; `gk_proj.1`, which GLADream's kernels read themselves, is not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device).eval()
    layers = [
        (name, each)
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear) and not name.endswith("gk_proj.1") and (weights != "int4" or name != "lm_head")
    ]
    chosen = {each for _, each in layers}
    if weights == "fp8":
        how = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
        for each in chosen:
            if not any(size % 16 for size in each.weight.shape):  # as torchao leaves others out
                weight = Float8Tensor.from_hp(
                    each.weight.data, mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=how
                )
                each.weight = nn.Parameter(weight, requires_grad=False)
    elif weights != "plain":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
        if weights == "int4":
            config = Int4WeightOnlyConfig(
                group_size=32, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        quantize_(model, config, lambda module, name: module in chosen)
    if weights != "plain":
        number = sum(type(each.weight) is not nn.Parameter for each in chosen)
        print(f"{folder.name}: {number} of {len(chosen)} layers in {weights}", flush=True)
    return model


def solved(model, ids: torch.Tensor, solutions: torch.Tensor, args: argparse.Namespace, cache, seed: int | None):
    """`(puzzles,)` bool; greedily without a seed."""
    given = {"cache_dtype": cache, "cache_policy": args.cache_policy, "block_length": args.block_length}
    options = {name: value for name, value in given.items() if value is not None}
    options |= {} if seed is None else {"generator": torch.Generator(args.device).manual_seed(seed)}
    temperature = 0.0 if seed is None else 1.0
    written = [
        model.diffusion_generate(part, max_new_tokens=0, temperature=temperature, **options)
        for part in ids.split(args.batch)
    ]
    return (torch.cat(written) == solutions).all(1)


def measure_sudoku(folder: Path, tokenizer, args: argparse.Namespace):
    """Yields a dict for each format and level."""
    write = lambda row: "".join(map(str, row)).replace("0", MASK)
    references: dict[str, torch.Tensor] = {}
    variants = [("plain", None), *[(weights, None) for weights in args.formats], *[("plain", c) for c in args.caches]]
    models = {weights: load(folder, weights, args) for weights, _ in variants}
    for level, clues in LEVELS.items():
        grids = generate(1000, clues, torch.Generator().manual_seed(HELD_OUT_SEED))
        ids, solutions = (
            torch.tensor(tokenizer([write(row) for row in part[: args.puzzles].tolist()]).input_ids, device=args.device)
            for part in grids
        )
        for weights, cache in variants:
            model = models[weights]
            greedy = solved(model, ids, solutions, args, cache, None)
            drawn = [
                solved(model, ids, solutions, args, cache, seed).float().mean().item() for seed in range(args.seeds)
            ]
            before = references.setdefault(level, greedy)
            won, lost = int((greedy & ~before).sum()), int((before & ~greedy).sum())
            found = {"solved": greedy.float().mean().item(), "won": won, "lost": lost, "drawn": drawn}
            yield {"weights": weights, "cache": cache, "task": level, **found}


def measure_text(folder: Path, tokenizer, args: argparse.Namespace):
    """Yields a dict for each format."""
    tokens = tokenizer(args.text.read_text(encoding="utf-8"), verbose=False).input_ids
    tokens = held_out(torch.tensor(tokens, device=args.device))[: args.characters]
    for weights in ["plain", *args.formats]:
        yield {"weights": weights, "bound": negative_evidence_bound(load(folder, weights, args), tokens, args.levels)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("checkpoints", nargs="+", type=Path)
    formats = ["fp8", "int8", "int4"]
    parser.add_argument("--formats", nargs="*", choices=formats, default=formats if on_gpu else ["int8"])
    parser.add_argument("--caches", nargs="*", choices=CACHE_DTYPES, default=[], help="of keys and values, for puzzles")
    parser.add_argument("--cache-policy", help="for puzzles; by default the checkpoint's own")
    parser.add_argument("--block-length", type=int, help="for puzzles; by default the checkpoint's own")
    parser.add_argument("--text", type=Path, help="the training text; its last tenth is held out")
    parser.add_argument("--puzzles", type=int, default=1000, help="of each level")
    parser.add_argument("--seeds", type=int, default=3, help="with which puzzles are solved at temperature 1")
    parser.add_argument("--batch", type=int, default=250 if on_gpu else 50)
    parser.add_argument("--characters", type=int, default=10**6, help="of the held-out text, at most")
    parser.add_argument("--levels", type=int, default=8, help="noise levels for each window of text")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="bfloat16 for fp8 and int4")
    parser.add_argument("--out", type=Path, help="append the figures to this .jsonl file")
    args = parser.parse_args()
    if args.dtype != "bfloat16" and {"fp8", "int4"} & {*args.formats}:
        parser.error("fp8 and int4 take --dtype bfloat16.")
    for folder in args.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        is_sudoku = tokenizer.mask_token == MASK
        if not is_sudoku and args.text is None:
            parser.error(f"{folder} is a text checkpoint: --text must name the text that it was trained on.")
        run = {
            "checkpoint": folder.name,
            "dtype": args.dtype,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        run["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        for found in (measure_sudoku if is_sudoku else measure_text)(folder, tokenizer, args):
            print(folder.name, found, flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**run, **found}) + "\n")


if __name__ == "__main__":
    main()
