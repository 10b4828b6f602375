"""How many Sudoku puzzles a checkpoint solves from files exported to ExecuTorch, beside the model itself.

usage: edge_quality.py [--checkpoint hub_configs/llada-tiny-sudoku] [--puzzles 200] [--seed 1] [--quantizations int8 int4]
Puzzles of 33 to 36 clues; `low_confidence_dynamic` at 0.9. Prints, for each quantisation, the size of its file, what it solves,
and the puzzles that it solves and the model does not (won), and the other way around (lost).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_hf.edge import DiffusionEdge, export_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from sudoku import MASK, generate  # noqa: E402

ROWS = 4


def solved(model, tokenizer, puzzles: list[str], texts: list[str]) -> torch.Tensor:
    """`(puzzles,)` bool."""
    results = []
    options = {"max_new_tokens": 0, "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9}
    for start in range(0, len(puzzles), ROWS):
        inputs = tokenizer(puzzles[start : start + ROWS], return_tensors="pt")
        filled = model.diffusion_generate(**inputs, **options)[:, -81:]
        expected = tokenizer(texts[start : start + ROWS], return_tensors="pt").input_ids[:, -81:]
        results.append((filled == expected).all(1))
    return torch.cat(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="hub_configs/llada-tiny-sudoku")
    parser.add_argument("--puzzles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quantizations", nargs="+", default=["int8", "int4"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    masked, text = generate(args.puzzles, (33, 36), torch.Generator().manual_seed(args.seed))
    puzzles, texts = ([*map("".join, ([*map(str, row)] for row in each.tolist()))] for each in (masked, text))
    puzzles = [puzzle.replace("0", MASK) for puzzle in puzzles]
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    reference = solved(model, tokenizer, puzzles, texts)
    print(f"{args.checkpoint}, {args.puzzles} puzzles: eager fp32 solves {reference.float().mean():.1%}", flush=True)
    columns = tokenizer(puzzles[0], return_tensors="pt").input_ids.shape[1]
    for quantization in args.quantizations:
        with tempfile.TemporaryDirectory() as folder:
            inputs = (torch.zeros(ROWS, columns, dtype=torch.long),)
            path = export_model(model, inputs, Path(folder) / "out", quantization, block_length=columns)
            exported = DiffusionEdge.from_pretrained(path, num_threads=1)
            found = solved(exported, tokenizer, puzzles, texts)
        won, lost = int((found & ~reference).sum()), int((reference & ~found).sum())
        print(f"{quantization}: solves {found.float().mean():.1%}, {won} won, {lost} lost", flush=True)


if __name__ == "__main__":
    main()
