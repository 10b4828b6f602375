"""How attention is divided: tiles of queries and keys, parts of the keys, stages of loads."""

import torch

from .triton import triton

# Queries of a key head in one row, on average, up to which several programs for each processor pay. Every part writes the
# results of its queries in float32: for many queries two programs for each processor cost up to twice the time.
FEW = 24


def number_of_splits(programs: int, width: int, device: torch.device, load: float = 0) -> int:
    """Parts of the keys: one program for each processor, or `load` of them in up to 16 parts, and at least 64 keys in a
    part."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = max(processors // programs, min(round(load * processors / programs), 16))
    return max(1, min(wanted, width // 64, 32))


def number_of_stages(block_m: int, block_n: int, row: int, device: torch.device) -> int:
    """Pipeline stages of the loads: three, or as many as fit into shared memory. `row`: bytes of a row."""
    room = 48 * 1024
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined] # not in the stub
    return max(1, min(3, (room - block_m * row) // (2 * block_n * row)))


def queries_of_tile(is_float32: bool, in_eight_bits: bool) -> int:
    """Queries of a key head that a tile has at most, for which keys are read once."""
    return 16 if is_float32 else 32 if in_eight_bits else 64


def tile_of(rows: int, is_float32: bool, in_eight_bits: bool) -> tuple[int, int, int, int]:
    """The axis of a tile of scores along which the keys are, its queries and keys, and how many warps compute it.

    A product on the GPU has at least 16 rows and 8 columns: a few queries are columns, so that less is computed for nothing.
    """
    if is_float32:  # serves comparisons: small, so that it stays in registers
        return 1, 16, 16, 4
    if in_eight_bits and rows <= 8:
        return 0, 8, 32, 1
    if in_eight_bits and rows <= 16:
        return 1, 16, 128, 4
    most = queries_of_tile(is_float32, in_eight_bits)
    return 1, max(16, min(most, triton.next_power_of_2(rows))), 64, 4
