"""What weights of 4 bits cost in quality, by recipe: group sizes, and bits of embedding and head. Computed in PyTorch, without
exporting: torchao's tensors multiply as the exported programs do.

usage: int4_recipes.py CHECKPOINT [--puzzles 200] [--solve]
CHECKPOINT solves Sudoku, as hub_configs/*-tiny-sudoku do. Prints for each recipe the error of the logits at masked positions (root
mean square, in standard deviations), of the first 100 held-out puzzles with all, 3/4 and 1/2 of their blanks masked; with
--solve also the share of puzzles solved, and how many the recipe and the checkpoint each solved alone.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from exported_quality import solved
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  # registers the models

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from decoding_quality import HELD_OUT_SEED, LEVELS  # noqa: E402
from sudoku import MASK, generate  # noqa: E402


class Recipe(NamedTuple):
    """Bits of the layers' weights, of the embedding's and of the head's. group: weights that share a scale in 4 bits."""

    layers: int
    embedding: int
    head: int
    group: int = 32


RECIPES = [Recipe(8, 8, 8), *(Recipe(4, 8, 8, group) for group in (32, 64, 128))]
RECIPES += [Recipe(4, 4, 8), Recipe(4, 8, 4), Recipe(4, 4, 4)]


def quantized(model: Any, recipe: Recipe) -> Any:
    """A copy of the model."""
    model = copy.deepcopy(model)
    is_layer = lambda name: ".layers." in name
    for bits, is_chosen in ((recipe.layers, is_layer), (recipe.head, lambda name: not is_layer(name))):
        size = PerAxis(0) if bits == 8 else PerGroup(recipe.group)
        how = Int8DynamicActivationIntxWeightConfig(weight_dtype=getattr(torch, f"int{bits}"), weight_granularity=size)
        quantize_(model, how, lambda module, name, chosen=is_chosen: isinstance(module, nn.Linear) and chosen(name))
    size = PerAxis(0) if recipe.embedding == 8 else PerGroup(32)
    how = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{recipe.embedding}"), granularity=size)
    quantize_(model, how, lambda module, name: isinstance(module, nn.Embedding))
    return model


@torch.no_grad()
def logits_at_masks(model: Any, puzzles: torch.Tensor, solutions: torch.Tensor) -> torch.Tensor:
    """`(positions, vocab)`."""
    generator, mask = torch.Generator().manual_seed(1), model.config.mask_token_id
    is_blank = torch.cat(
        [(torch.rand(puzzles.shape, generator=generator) < part) & (puzzles == mask) for part in (1, 0.75, 0.5)]
    )
    texts = torch.where(is_blank, mask, solutions.repeat(3, 1))
    logits = torch.cat([model(part).logits for part in texts.split(50)])
    return logits.roll(model.logits_shift, 1)[is_blank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--puzzles", type=int, default=200)
    parser.add_argument("--solve", action="store_true")
    args = parser.parse_args()
    args.threshold, args.batch = 0.9, 8
    grids = generate(args.puzzles, LEVELS["33-36 clues"], torch.Generator().manual_seed(HELD_OUT_SEED))
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    write = lambda row: "".join(map(str, row)).replace("0", MASK)
    puzzles, solutions = (torch.tensor(tokenizer([write(row) for row in each.tolist()]).input_ids) for each in grids)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    reference = logits_at_masks(model, puzzles[:100], solutions[:100])
    right = solved(model, puzzles, solutions, args) if args.solve else None
    for recipe in RECIPES:
        smaller = quantized(model, recipe)
        logits = logits_at_masks(smaller, puzzles[:100], solutions[:100])
        error = (logits - reference).square().mean().sqrt() / reference.std()
        print(f"{recipe}: error {error:.3f}", end="" if args.solve else "\n", flush=True)
        if right is not None:
            other = solved(smaller, puzzles, solutions, args)
            print(f", {100 * other.float().mean():.1f}% of {len(other)} solved,", end=" ")
            print(f"{int((other & ~right).sum())} won, {int((right & ~other).sum())} lost", flush=True)


if __name__ == "__main__":
    main()
