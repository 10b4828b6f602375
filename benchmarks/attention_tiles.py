"""Attention on a GPU by tiles, pipeline stages and parts of the keys: whether what `kernels/tiles.py` chooses is the fastest.

usage: attention_tiles.py [--encodings bf16 int8 fp8] [--cases "sdar-4b 128x4" ...] [--seconds 60]

Microseconds a layer in a CUDA graph. A case `rows x tokens` has lengths of half to one and a half times the mean, and each row keys of
its own, of three layers in turn, so that no cache of the GPU holds them. `prompt`: one row's 2,004 tokens. `apart`, `together`: rows
whose first 2,000 columns are the same, see `Cascade`. The bound beside it: reading keys and values once at 3.0 TB/s. After `--seconds`
for a case the best so far is printed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import NamedTuple

import torch
from step_kernels import HEAD_DIM, in_eight_bits, random
from timing import captured, milliseconds

from dllm_hf.generation.window import RUN_LENGTH, Frame, Pays, make_list
from dllm_hf.kernels import attention
from dllm_hf.kernels.attention import Cascade, canvas_attention
from dllm_hf.kernels.tiles import number_of_splits, number_of_stages, tile_of

DEVICE, LAYERS = "cuda", 3


class Case(NamedTuple):
    """rows, tokens: the shape of a step; `longer` rows have twice the tokens. columns: seen, on average. shared: of them the same in
    all rows, read `together` or not."""

    rows: int
    tokens: int
    columns: int
    heads: int
    kv_heads: int
    longer: int = 0
    shared: int = 0
    together: bool = False


CASES = {
    "sdar-4b 128x4": Case(128, 4, 640, 32, 8),
    "sdar-4b 128x4 and 8": Case(128, 4, 640, 32, 8, longer=32),
    "llada-8b 32x4": Case(32, 4, 752, 32, 32),
    "sdar-8b 32x4": Case(32, 4, 640, 32, 8),
    "sdar-8b 1x4": Case(1, 4, 640, 32, 8),
    "llada-8b 1x32": Case(1, 32, 640, 32, 32),
    "prompt": Case(1, 2004, 0, 32, 8),
    "apart": Case(64, 4, 2000, 32, 8, shared=2000),
    "together": Case(64, 4, 2000, 32, 8, shared=2000, together=True),
}
# The axis of the keys, queries, keys, warps: see `tile_of`.
TILES = [(1, queries, keys, warps) for queries in (16, 32, 64, 128) for keys in (32, 64, 128) for warps in (2, 4, 8)]
TILES += [(0, queries, keys, warps) for queries in (8, 16) for keys in (32, 64) for warps in (1, 2)]


@dataclass
class Choice:
    """The tile, the stages, and how many programs each processor gets; None: as `tiles.py` chooses."""

    tile: tuple[int, int, int, int] | None = None
    stages: int | None = None
    load: float | None = None

    def apply(self, least: int) -> None:
        """`least`: tiles of fewer queries are left as they are."""
        attention.tile_of = lambda rows, *more: self.tile if self.tile and rows >= least else tile_of(rows, *more)
        attention.number_of_stages = lambda *args: self.stages or number_of_stages(*args)
        attention.number_of_splits = lambda programs, width, device, load=0: number_of_splits(
            programs, width, device, load if self.load is None else self.load
        )


def attend(case: Case, encoding: str | None) -> tuple[Callable[[], object], float]:
    """A call for each layer, and the bytes of a layer's keys and values that have to be read."""
    dice, count = Random(0), range(case.rows)
    tokens = [case.tokens * (2 if row < case.longer else 1) for row in count]
    before = [case.shared or int(case.columns * (0.5 + dice.random())) for _ in count]
    grid = 0 if case.columns else 4  # a prompt's tokens see up to the end of their block, others all
    frames = [Frame(seen, seen + fed, 0, 0, seen + fed, 0, 0, grid) for seen, fed in zip(before, tokens)]
    pays = Pays(16, 1) if case.together else None
    flat = make_list(frames, list(count), case.rows, 0, 0, 0, None, [(1, case.shared)] * case.rows, pays)
    flat = flat.to(torch.device(DEVICE))
    # What rows share stands first, and of each row what it does not.
    ends = list(accumulate((frame.end - case.shared for frame in frames), initial=case.shared))
    base = (torch.tensor(ends[:-1], device=DEVICE) - case.shared)[flat.runs[:, 0]]
    more: dict = {}
    if case.shared:
        more["shared"] = torch.tensor([[0], [case.shared]], device=DEVICE).repeat(1, len(flat.runs))
    if case.together:
        begins = torch.zeros(len(flat.pieces), dtype=torch.long, device=DEVICE)
        more["cascade"] = Cascade(flat.beginnings[None], begins, flat.pieces, RUN_LENGTH, flat.skipped)
    shape = (case.kv_heads, ends[-1], HEAD_DIM)
    arenas = [(random(*shape), random(*shape)) for _ in range(LAYERS)]
    layers = [(each, {}) if encoding is None else in_eight_bits(each, encoding) for each in arenas]
    query = random(1, sum(tokens), case.heads, HEAD_DIM)
    places = (flat.lengths[None], base, flat.visible, HEAD_DIM**-0.5, flat.runs, flat.longest)
    call = lambda: [canvas_attention(query, *each, *places, **scales, **more) for each, scales in layers]
    return call, ends[-1] * case.kv_heads * 2 * HEAD_DIM * (2 if encoding is None else 1)


def measure(name: str, encoding: str | None, seconds: float) -> None:
    case, until = CASES[name], time.monotonic() + seconds
    run, size = attend(case, encoding)
    groups = case.heads // case.kv_heads
    piece = RUN_LENGTH * groups if case.together else min(case.tokens * (1 + bool(case.longer)), RUN_LENGTH) * groups
    found: list[tuple[float, Choice]] = []

    def try_out(choice: Choice) -> float:
        if time.monotonic() < until:
            choice.apply(piece if case.together else 1)
            try:
                found.append((1000 * milliseconds(captured(run)) / LAYERS, choice))
            except Exception as error:  # a tile that has no room on the GPU
                print(f"    {choice}: {str(error)[:90]}")
        return found[-1][0]

    for _ in range(3):  # clocks and caches
        now = try_out(Choice())
    found = found[-1:]
    print(f"{name}, {encoding or 'bf16'}: {now:.1f} us now, reading {size / 3.0e6:.1f}", flush=True)
    for choice in [Choice(stages=each) for each in (1, 2, 3, 4)] + [Choice(load=each) for each in (0, 1.8, 2.7, 5.4)]:
        try_out(choice)
    best = min(found, key=lambda each: each[0])[1]
    for tile in TILES:
        if piece <= tile[1] or tile[1] == max(queries for _, queries, *_ in TILES):
            try_out(Choice(tile, best.stages, best.load))
    for us, choice in sorted(found, key=lambda each: each[0])[:5]:
        print(f"    {us:7.1f} us  {choice}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodings", nargs="+", choices=["bf16", "int8", "fp8"], default=["bf16"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=60, help="for a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("This measures a GPU, and there is none.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for encoding in args.encodings:
        for name in args.cases:
            measure(name, None if encoding == "bf16" else encoding, args.seconds)


if __name__ == "__main__":
    main()
