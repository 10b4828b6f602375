"""A denoising step's matrix products on a GPU, by format of the weights and by who multiplies.

usage: quantized_products.py [--rows 4 16 32 64 128] [--models sdar llada dream] [--formats fp8 int8 int4] [--search]
                             [--out products.jsonl]

Microseconds in a CUDA graph that multiplies with one weight after another, of which there are enough that none is in the L2
cache, in the shapes of SDAR-8B, LLaDA-8B and Dream-7B; and for each model the milliseconds of all products of a step. `bf16`:
`F.linear`. `torchao`: its quantised linear layer, inputs in bf16. `scaled_mm`: `torch._scaled_mm` on inputs that an earlier
kernel has quantised. `ours`: `kernels/products.py`, on such inputs in fp8 and on bf16 with int8. With --search `best`: the
same in the best of some fifty tiles, which are printed. Below, what quantising costs in the kernels that do it.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from timing import captured, milliseconds
from torch.nn import functional as F
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

from dllm_hf.kernels import products
from dllm_hf.kernels.layers import add_rms_norm, quantize_rows, swiglu
from dllm_hf.kernels.products import Tiles, few_rows_product

# Layers; outputs and inputs of the joint product of q, k and v, of o, of the joint product of gate and up, of down; the head.
MODELS = {
    "sdar": (36, {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}, (151936, 4096)),
    "llada": (32, {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}, (126464, 4096)),
    "dream": (28, {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}, (152064, 3584)),
}  # fmt: skip
CONFIGS = {
    "fp8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "int8": Int8WeightOnlyConfig(),
    "int4": Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"),
}
NOT_IN_CACHE = 256 * 2**20  # bytes, five times the L2 cache of an H100


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def quantized(format: str, outputs: int, size: int) -> list:
    """As many weights as the L2 cache cannot hold, quantised by torchao."""
    linear = torch.nn.Linear(size, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    quantize_(linear, CONFIGS[format])
    first = linear.weight.detach()
    number = -(-NOT_IN_CACHE // (first.qdata.nbytes)) + 1
    return [first, *(first.clone() for _ in range(number - 1))]


def microseconds(product: Callable, weights: list) -> float:
    return 1000 * milliseconds(captured(lambda: [product(weight) for weight in weights])) / len(weights)


def candidates(rows: int, is_float8: bool) -> list[Tiles]:
    block, found = max(16, min(128, 1 << (rows - 1).bit_length())), []
    for outputs, size, stages, warps in itertools.product((16, 32, 64, 128), (128, 256, 512), (4, 6), (4, 8)):
        for is_turned in (False, True) if outputs >= 64 and is_float8 else (False,):
            for of_rows in {block, min(block, 64)}:
                bytes_of_stage = size * (outputs + of_rows * (1 if is_float8 else 2))
                if 16 * 1024 <= bytes_of_stage * (stages - 1) <= 200 * 1024 and outputs * of_rows <= 8192:
                    found.append(Tiles(of_rows, outputs, size, warps, stages, is_turned))
    return found


def compile_all(tiles: list[Tiles], x, weight, scales, dtype) -> list[Tiles]:
    """Those that can be compiled, in parallel."""
    run = products._few_rows_product.warmup

    def one(each: Tiles) -> bool:
        values, of_rows = x if isinstance(x, tuple) else (x, scales)
        out = torch.empty(16, len(weight), dtype=dtype, device="cuda")
        with torch.cuda.device(0):
            try:
                run(values, of_rows, weight, scales, scales, out, 16, *weight.shape, IS_FLOAT8=isinstance(x, tuple), HAS_BIAS=False,
                    IS_TURNED=each.is_turned, IS_EVEN=weight.shape[1] % each.size == 0, BLOCK_M=each.rows, BLOCK_N=each.outputs,
                    BLOCK_K=each.size, num_warps=each.warps, num_stages=each.stages, grid=(1,))  # fmt: skip
            except Exception as error:
                print(f"{each}: {str(error).splitlines()[0]}", file=sys.stderr)
                return False
        return True

    with ThreadPoolExecutor(16) as threads:
        return [each for each, is_good in zip(tiles, threads.map(one, tiles), strict=True) if is_good]


def ours(x, tiles: Tiles | None = None) -> Callable:
    def product(weight):
        return few_rows_product(x, weight.qdata, weight.scale, None, torch.bfloat16)

    if tiles is None:
        return product

    def with_tiles(weight):
        chosen, products.tiles_of = products.tiles_of, lambda *_: tiles
        try:
            return product(weight)
        finally:
            products.tiles_of = chosen

    return with_tiles


def measured(format: str, weights: list, rows: int, search: bool) -> dict:
    """Microseconds by who multiplies, and the best tiles."""
    x = random(rows, weights[0].shape[1])
    found: dict = {f"{format} torchao": microseconds(lambda weight: F.linear(x, weight), weights)}
    if format == "int4":
        return found
    given = quantize_rows(x) if format == "fp8" else x
    if format == "fp8":
        multiply = lambda weight: torch._scaled_mm(
            given.values,
            weight.qdata.t(),
            given.scales,
            weight.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        found["fp8 scaled_mm"] = microseconds(multiply, weights)
    expected, got = F.linear(x, weights[0]).float(), ours(given)(weights[0]).float()
    assert (got - expected).norm() < 0.02 * expected.norm(), (format, rows, weights[0].shape)
    found[f"{format} ours"] = microseconds(ours(given), weights)
    if search and len(weights[0]) >= MODELS["llada"][2][0]:  # the head takes what the others do
        found[f"{format} best"] = found[f"{format} ours"]
    elif search:
        first = weights[0]
        tiles = compile_all(candidates(rows, format == "fp8"), given, first.qdata, first.scale, torch.bfloat16)
        times = {}
        for each in tiles:
            try:
                times[each] = microseconds(ours(given, each), weights)
            except Exception as error:  # of Triton, where a program needs more than the GPU has
                print(f"{each}: {str(error).splitlines()[0]}", file=sys.stderr)
        ranked = sorted(times, key=times.__getitem__)
        found[f"{format} best"] = times[ranked[0]]
        found[f"{format} tiles"] = [(*each, round(times[each], 2)) for each in ranked[:6]]
    return found


def quantising(rows: int, size: int, inside: int) -> dict:
    """Microseconds of the kernels that quantise, beside the same without."""
    x, residual, weight, gates = random(1, rows, size), random(1, rows, size), random(size), random(1, rows, 2 * inside)
    gate, up = gates.chunk(2, dim=-1)
    runs = {
        "norm": lambda: add_rms_norm(x, residual, weight, 1e-6),
        "norm in fp8": lambda: add_rms_norm(x, residual, weight, 1e-6, quantizes=True),
        "gate": lambda: swiglu(gate, up),
        "gate in fp8": lambda: swiglu(gate, up, quantizes=True),
        "attention's output to fp8": lambda: quantize_rows(x),
    }
    return {name: microseconds(lambda _, run=run: run(), [None] * 50) for name, run in runs.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 32, 64, 128])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--search", action="store_true", help="try some fifty tiles of our kernel: minutes")
    parser.add_argument("--out", type=Path, help="append the figures to this .jsonl file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("This measures a GPU, and there is none.")
    shapes = {shape for name in args.models for shape in (*MODELS[name][1].values(), MODELS[name][2])}
    times: dict[tuple, dict] = {(rows, *shape): {} for rows in args.rows for shape in shapes}
    for outputs, size in sorted(shapes):
        plain = [random(outputs, size) for _ in range(-(-NOT_IN_CACHE // (2 * outputs * size)) + 1)]
        for rows in args.rows:
            x = random(rows, size)
            times[rows, outputs, size]["bf16"] = microseconds(lambda weight, x=x: F.linear(x, weight), plain)
        del plain
        for format in args.formats:
            weights = quantized(format, outputs, size)
            for rows in args.rows:
                times[rows, outputs, size] |= measured(format, weights, rows, args.search)
            del weights
        for rows in args.rows:
            found = times[rows, outputs, size]
            print(
                f"{outputs} x {size}, {rows} rows:",
                ", ".join(f"{n} {t:.1f}" for n, t in found.items() if not isinstance(t, list)),
            )
            for name, tiles in found.items():
                if isinstance(tiles, list):
                    print(f"    {name}: {tiles}", flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"outputs": outputs, "size": size, "rows": rows, **found}) + "\n")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds of a step's products\n")
    names = [name for name, time in times[(args.rows[0], *min(shapes))].items() if not isinstance(time, list)]
    print("| model | rows | " + " | ".join(names) + " |\n" + "|---" * (2 + len(names)) + "|")
    for model in args.models:
        layers, of_layer, head = MODELS[model]
        for rows in args.rows:
            sums = [
                (layers * sum(times[(rows, *shape)][name] for shape in of_layer.values()) + times[(rows, *head)][name])
                / 1000
                for name in names
            ]
            print(f"| {model} | {rows} | " + " | ".join(f"{each:.2f}" for each in sums) + " |")
    print("\nMicroseconds of a kernel, hidden size 4096, inside 12288:")
    for rows in args.rows:
        print(f"{rows} rows:", ", ".join(f"{name} {time:.1f}" for name, time in quantising(rows, 4096, 12288).items()))


if __name__ == "__main__":
    main()
