"""Solve a Sudoku with a file for ExecuTorch, in a process without the code of any model.

python examples/edge_sudoku.py FOLDER [PUZZLE]

FOLDER is what `dllm-hf export-edge` wrote. `import dllm_hf` would register the models, and import them for that; this program
gives the package's folder a module of its own instead, and ends with an error if the code of a model was imported after all.
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# One that the small checkpoint was not trained on: `sudoku.generate` with the seed of the held-out puzzles.
PUZZLE = ".5..73..82981.5.7.1.7.9...56...8...47.9..18....1.....9.6241....81..3649..74....6."
PACKAGE = "dllm_hf"


def without_models() -> None:
    """Make `dllm_hf.runtimes` importable without `dllm_hf/__init__.py`."""
    package = ModuleType(PACKAGE)
    package.__path__ = find_spec(PACKAGE).submodule_search_locations
    sys.modules[PACKAGE] = package


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("puzzle", nargs="?", default=PUZZLE, help="81 characters, . for a blank")
    args = parser.parse_args()
    without_models()
    import torch
    from transformers import PreTrainedTokenizerFast

    from dllm_hf.runtimes.executorch_runtime import DiffusionEdge

    model = DiffusionEdge.from_pretrained(args.folder, num_threads=1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    begin = time.perf_counter()
    options = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9, "max_new_tokens": 0}
    inputs = torch.tensor([tokenizer(args.puzzle).input_ids])
    output = model.diffusion_generate(inputs, return_dict_in_generate=True, **options)
    seconds = time.perf_counter() - begin
    grid = "".join(tokenizer.convert_ids_to_tokens(output.sequences[0].tolist()))[-81:]
    for start in range(0, 81, 9):
        print(args.puzzle[start : start + 9], " ", grid[start : start + 9])
    size = sum(file.stat().st_size for file in args.folder.glob("*.pte")) / 1e6
    print(f"{size:.1f} MB, {output.num_forward_passes} steps, {seconds:.2f} s")
    models = [name for name in sys.modules if ".modeling_" in name and "modeling_auto" not in name]
    models = [name for name in models if name.startswith(("transformers.models.", f"{PACKAGE}."))]
    if models:
        print(f"error: the code of models was imported: {', '.join(models)}", file=sys.stderr)
        return 2
    print("no code of a model was imported")
    return 0 if is_solved(args.puzzle, grid) else 1


def is_solved(puzzle: str, grid: str) -> bool:
    """Whether a grid keeps the clues and has each digit once in every row, column and box."""
    units = [range(9 * i, 9 * i + 9) for i in range(9)] + [range(i, 81, 9) for i in range(9)]
    units += [[27 * (i // 3) + 3 * (i % 3) + 9 * (j // 3) + j % 3 for j in range(9)] for i in range(9)]
    keeps_clues = all(clue in (".", cell) for clue, cell in zip(puzzle, grid, strict=True))
    return keeps_clues and all({grid[cell] for cell in unit} == {*"123456789"} for unit in units)


if __name__ == "__main__":
    sys.exit(main())
