"""What exporting costs in quality: the same held-out Sudoku puzzles solved by a checkpoint and by its exported folders.

usage: exported_quality.py CHECKPOINT FOLDER... [--puzzles 200] [--batch 8] [--threshold 0.9]
Prints for each the share solved, and of the puzzles on which the folder and the checkpoint differ how many each solved alone.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_hf.runtimes.exported import load_exported

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from decoding_quality import HELD_OUT_SEED, LEVELS  # noqa: E402
from sudoku import MASK, generate  # noqa: E402


def solved(model, puzzles: torch.Tensor, solutions: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """`(puzzles,)` bool."""
    options = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": args.threshold}
    written = [model.diffusion_generate(part, max_new_tokens=0, **options) for part in puzzles.split(args.batch)]
    return (torch.cat(written) == solutions).all(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--puzzles", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threshold", type=float, default=0.9)
    args = parser.parse_args()
    grids = generate(args.puzzles, LEVELS["33-36 clues"], torch.Generator().manual_seed(HELD_OUT_SEED))
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    write = lambda row: "".join(map(str, row)).replace("0", MASK)
    puzzles, solutions = (torch.tensor(tokenizer([write(row) for row in each.tolist()]).input_ids) for each in grids)
    reference = None
    for name in (args.checkpoint, *args.folders):
        if reference is None:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        else:
            model = load_exported(name)
        began = time.process_time()
        right = solved(model, puzzles, solutions, args)
        seconds = time.process_time() - began
        reference = right if reference is None else reference
        won, lost = int((right & ~reference).sum()), int((reference & ~right).sum())
        print(f"{name}: {100 * right.float().mean():.1f}% of {len(right)}, {won} won, {lost} lost;", end=" ")
        print(f"{seconds:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
