"""Decode with a file of `dllm-hf export-edge` in Python without PyTorch: `pip install executorch-numpy-runtime` (Python 3.12).

echo 5 6 7 | python examples/edge_numpy.py model.pte --new 32

Token ids in, token ids out: the likeliest token of a block goes first, one in each step, without a cache, as
`diffusion_generate(cache_policy="none", remasking_strategy="low_confidence_static")` has it. Each method of a file has buffers of
its own in this runtime, so that `step` cannot read what `prefill` has written; `prefill` alone takes windows of any length.
"""

import argparse
import sys

import numpy as np

NUMBERS = ("max_rows", "max_columns", "max_block_length", "logits_shift", "sees_earlier_blocks", "mask_token_id")


def decode(file: str, prompt: list[int], new: int) -> list[int]:
    """The tokens that follow the prompt."""
    from executorch_numpy_runtime import Runtime  # here, so that --help needs no runtime

    program = Runtime.get().load_program(file)
    rows, columns, length, shift, is_grid, mask = (int(program.load_method(name)([])[0]) for name in NUMBERS)
    prefill, shown = program.load_method("prefill"), len(prompt) + new
    size = -(-shown // length) * length if is_grid else shown
    if size > columns or mask in prompt:
        raise ValueError(f"{size} columns do not fit into the {columns} of the file, or the prompt holds a mask.")
    text, places = np.array([*prompt, *[mask] * (size - len(prompt))]), np.arange(size)
    tokens, where, lengths = np.zeros((rows, size), int), np.full((rows, size), columns), np.ones((rows, size), int)
    where[0], lengths[0] = places, np.minimum((places // length + 1) * length, size) if is_grid else size
    for start in range(len(prompt) // length * length if is_grid else len(prompt), shown, length):
        block = text[start : start + length]
        keep = np.tile(np.clip(start + np.arange(length) - shift, 0, size - 1), (rows, 1))
        while (block == mask).any():
            tokens[0] = text
            logits = prefill([tokens, where, lengths, keep])[0][0, : len(block)]
            total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
            logits[:, mask] = -np.inf
            best = np.where(block == mask, logits.max(-1) - total, -np.inf).argmax()
            block[best] = logits[best].argmax()
    return text[len(prompt) : shown].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    print(*decode(args.file, [int(word) for word in sys.stdin.read().split()], args.new))


if __name__ == "__main__":
    main()
