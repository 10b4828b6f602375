"""The operations between the matrix products of a denoising step, on a GPU: our Triton kernels beside alternatives.

usage: step_kernels.py [--rows 32 256] [--out kernels.jsonl]

Microseconds in a CUDA graph, in the shapes of LLaDA-8B and bf16, blocks of 32 and a canvas of 768 columns: as
transformers writes it (`torch`), the same compiled by Inductor, by Liger (https://github.com/linkedin/Liger-Kernel) where
it is installed and has such a kernel, ours, and ours with keys and values in 8 bits, by encoding.
"""

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from random import Random

import torch
from timing import captured, milliseconds
from torch.nn import functional as F

from dllm_hf.generation.window import RUN_LENGTH, Frame, Pays, make_list
from dllm_hf.kernels.attention import Cascade, canvas_attention
from dllm_hf.kernels.best_tokens import best_tokens, best_tokens_torch
from dllm_hf.kernels.eight_bits import ENCODINGS, quantised
from dllm_hf.kernels.layers import (
    add_rms_norm,
    add_rms_norm_torch,
    rotate_and_store,
    rotate_and_store_torch,
    swiglu,
    swiglu_torch,
)

try:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward
    from liger_kernel.ops.rms_norm import rms_norm_forward
    from liger_kernel.ops.rope import rope_forward
    from liger_kernel.ops.swiglu import swiglu_forward
except ImportError:
    rope_forward = None

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCAB, WIDTH, BLOCK = 4096, 12288, 32, 128, 126_464, 768, 32


def microseconds(run, repeats: int = 20) -> float:
    def several():
        for _ in range(repeats):
            run()

    return 1000 * milliseconds(captured(several)) / repeats


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def in_eight_bits(arenas: tuple[torch.Tensor, torch.Tensor], encoding: str) -> tuple[tuple[torch.Tensor, ...], dict]:
    """Keys and values, and what kernels take beside them."""
    (keys, of_keys), (values, of_values) = map(quantised, arenas, [encoding] * 2, [True, False])
    return (keys, values), {"scales": torch.stack([of_keys, of_values], dim=-1), "encoding": encoding}


def operations(batch: int) -> dict[str, dict]:
    """For each operation its implementations, as functions without arguments."""
    x, residual, weight = random(batch, BLOCK, HIDDEN), random(batch, BLOCK, HIDDEN), random(HIDDEN)
    gate, up = random(batch, BLOCK, 2 * INTERMEDIATE).chunk(2, dim=-1)
    query, key, value = random(batch, BLOCK, 3 * HIDDEN).chunk(3, dim=-1)
    cos, sin = random(batch, BLOCK, HEAD_DIM), random(batch, BLOCK, HEAD_DIM)
    norms = (random(HEAD_DIM), random(HEAD_DIM), 1e-6)
    columns = torch.arange(WIDTH - BLOCK, WIDTH, device="cuda").repeat(batch, 1)
    base = torch.arange(batch, device="cuda") * WIDTH
    arenas = random(HEADS, batch * WIDTH, HEAD_DIM), random(HEADS, batch * WIDTH, HEAD_DIM)
    keys, values = (
        each.unflatten(1, (batch, WIDTH)).transpose(0, 1) for each in arenas
    )  # (batch, HEADS, WIDTH, HEAD_DIM)
    lengths = torch.full((batch, BLOCK), WIDTH, dtype=torch.int32, device="cuda")
    logits = random(batch, BLOCK, VOCAB)
    heads = query.reshape(batch, BLOCK, HEADS, HEAD_DIM)
    places = (query, key, value, cos, sin, base[:, None] + columns)
    rotation = (*places, *arenas, *norms)
    ways = {
        "residual + norm": {
            "torch": lambda: add_rms_norm_torch(x, residual, weight, 1e-6),
            "ours": lambda: add_rms_norm(x, residual, weight, 1e-6),
        },
        "norm of heads, rotation, cache": {
            "torch": lambda: rotate_and_store_torch(*rotation),
            "ours": lambda: rotate_and_store(*rotation),
        },
        "gate": {"torch": lambda: swiglu_torch(gate, up), "ours": lambda: swiglu(gate, up)},
        "best token, probability, margin, entropy": {
            "torch": lambda: best_tokens_torch(logits, VOCAB - 1),
            "ours": lambda: best_tokens(logits, VOCAB - 1),
        },
    }
    for found in ways.values():
        found["inductor"] = torch.compile(found["torch"], dynamic=False)
    ways["attention"] = {
        "torch": lambda: F.scaled_dot_product_attention(heads.transpose(1, 2), keys, values),
        "ours": lambda: canvas_attention(heads, *arenas, lengths, base, WIDTH, HEAD_DIM**-0.5),
    }
    for encoding in ENCODINGS:
        small, scales = in_eight_bits(arenas, encoding)
        ways["norm of heads, rotation, cache"][encoding] = partial(rotate_and_store, *places, *small, *norms, **scales)
        seen = (heads, *small, lengths, base, WIDTH, HEAD_DIM**-0.5)
        ways["attention"][encoding] = partial(canvas_attention, *seen, **scales)
    if rope_forward is not None:
        rows, many = batch * BLOCK, batch * BLOCK * HEADS
        index = columns[:, None, :, None].expand_as(keys[:, :, :BLOCK])
        left, right = gate.contiguous(), up.contiguous()
        q, k = query.contiguous(), key.contiguous()

        def liger_rotation():
            turned = []
            for each, norm in ((q, norms[0]), (k, norms[1])):
                normed = rms_norm_forward(each.view(many, HEAD_DIM), norm, 1e-6, 0.0, "llama", None)[0]
                turned.append(normed.view(batch, BLOCK, HEADS, HEAD_DIM).transpose(1, 2))
            _, rotated, *_ = rope_forward(*turned, cos, sin)
            keys.scatter_(2, index, rotated)
            values.scatter_(2, index, value.reshape(batch, BLOCK, HEADS, HEAD_DIM).transpose(1, 2))

        flat = (x.view(rows, HIDDEN), residual.view(rows, HIDDEN), weight)
        ways["residual + norm"]["liger"] = lambda: fused_add_rms_norm_forward(*flat, 1e-6, 0.0, "llama")
        ways["gate"]["liger"] = lambda: swiglu_forward(left, right)
        ways["norm of heads, rotation, cache"]["liger"] = liger_rotation
    return ways


def attention_of_a_list(rows: int, kv_heads: int) -> list[float]:
    """Of a step in flight, blocks of 4 of which a fourth begin, 32 query heads, texts of some 700 tokens: microseconds, and how
    many TB of keys and values a second that is; the same in 8 bits, by encoding."""
    dice = Random(1)
    seen = sorted((min(3000, max(40, int(dice.lognormvariate(6.5, 0.7)))) for _ in range(rows)), reverse=True)
    fed = [8 if row % 4 == 0 else 4 for row in range(rows)]
    begin = [0, *itertools.accumulate(size + 8 for size in seen)]
    first = [0, *itertools.accumulate(fed)]
    arenas = random(kv_heads, begin[-1] + 8, HEAD_DIM), random(kv_heads, begin[-1] + 8, HEAD_DIM)
    lengths = [size for size, number in zip(seen, fed, strict=True) for _ in range(number)]
    lengths = torch.tensor([lengths], dtype=torch.int32, device="cuda")
    runs = torch.tensor([[row, first[row], fed[row]] for row in range(rows)], device="cuda")
    base, query = torch.tensor(begin[:-1], device="cuda"), random(1, first[-1], HEADS, HEAD_DIM)
    found = []
    for (keys, values), scales in ((arenas, {}), *(in_eight_bits(arenas, encoding) for encoding in ENCODINGS)):
        places = (lengths, base, 3072, HEAD_DIM**-0.5, runs, 8)
        time = microseconds(partial(canvas_attention, query, keys, values, *places, **scales))
        read = 2 * keys.element_size() * HEAD_DIM + (4 if scales else 0)
        found += [time, sum(seen) * kv_heads * read / time / 1e6]
    return found


def attention_of_a_beginning(rows: int, fed: int) -> list[float]:
    """Of rows that share 2,000 columns, have 40 others and feed `fed` tokens each, 32 query and 8 key heads: microseconds where
    each reads by itself, and where they read together."""
    frames = [Frame(2040 - fed, 2040, 0, 0, 2040, 0, 0, 0)] * rows
    flat = make_list(frames, list(range(rows)), rows, 0, 0, 0, None, [(1, 2000)] * rows, Pays(16, 1))
    flat = flat.to(torch.device("cuda"))
    arena = random(8, 2040 + 40 * rows, HEAD_DIM), random(8, 2040 + 40 * rows, HEAD_DIM)
    base, shared = 40 * flat.runs[:, 0], torch.tensor([[0], [2000]], device="cuda").repeat(1, len(flat.runs))
    places = (flat.lengths[None], base, 4096, HEAD_DIM**-0.5, flat.runs, flat.longest, shared)
    begins = torch.zeros(len(flat.pieces), dtype=torch.long, device="cuda")
    cascade = Cascade(flat.beginnings[None], begins, flat.pieces, RUN_LENGTH, flat.skipped)
    query = random(1, rows * fed, HEADS, HEAD_DIM)
    return [
        microseconds(lambda: canvas_attention(query, *arena, *places, cascade=way))  # noqa: B023
        for way in (None, cascade)
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256], help="tokens of a step, in blocks of 32")
    parser.add_argument("--out", type=Path, help="append the figures to this .jsonl file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("This measures a GPU, and there is none.")
    if any(rows < BLOCK or rows % BLOCK for rows in args.rows):
        parser.error(f"--rows must be multiples of {BLOCK}.")
    names = ("torch", "inductor", "liger", "ours", *ENCODINGS)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| | rows | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|")
    for rows in args.rows:
        for operation, ways in operations(rows // BLOCK).items():
            found = {name: microseconds(ways[name]) for name in names if name in ways}
            cells = [f"{found[name]:.1f}" if name in found else "-" for name in names]
            print(f"| {operation} | {rows} | " + " | ".join(cells) + " |", flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"operation": operation, "rows": rows, **found}) + "\n")
    titles = "".join(f" {name}microseconds | TB/s |" for name in ("", *(f"{encoding}, " for encoding in ENCODINGS)))
    print("\n| attention of a list, key heads | rows |" + titles)
    print("|---" * (4 + 2 * len(ENCODINGS)) + "|")
    for kv_heads, every in ((8, (1, 4, 8, 16, 32, 64, 128)), (32, (1, 8, 32))):
        for rows in every:
            found = attention_of_a_list(rows, kv_heads)
            cells = [f"{each:.2f}" for each in found]
            print(f"| {kv_heads} | {rows} | " + " | ".join(cells) + " |", flush=True)
    print(
        "\n| a shared beginning of 2,000, rows | tokens of each | microseconds, by itself | together |\n|---|---|---|---|"
    )
    for fed, rows in itertools.product((4, 8), (8, 16, 32, 64, 128)):
        apart, together = attention_of_a_beginning(rows, fed)
        print(f"| {rows} | {fed} | {apart:.1f} | {together:.1f} |", flush=True)


if __name__ == "__main__":
    main()
