"""Products of a few rows with weights in 8 bits, whose time is that of reading the weights."""

from typing import NamedTuple

import torch

from .layers import Float8Rows
from .triton import tl, triton

# Rows up to which the kernel is faster than what the libraries have: benchmarks/quantized_products.py.
MAX_ROWS = {torch.float8_e4m3fn: 64, torch.int8: 128}


class Tiles(NamedTuple):
    """How a product is cut. `rows`, `outputs`, `size`: of a tile; `is_turned`: whether the weights are the left factor."""

    rows: int
    outputs: int
    size: int
    warps: int
    stages: int
    is_turned: bool = False


def tiles_of(rows: int, outputs: int, weight: torch.dtype) -> Tiles:
    """The tiles that were measured to be fastest. Their inner size is the same for any number of rows, so that a row is summed
    in the same order in any company."""
    block = max(16, min(64, triton.next_power_of_2(rows)))
    size = 256 if weight == torch.float8_e4m3fn else 128  # the inputs of int8 have 16 bits
    return Tiles(block, 32 if outputs < 16384 else 64, size, 4, 4 if block < 64 else 3)


def few_rows_product_torch(
    x: torch.Tensor | Float8Rows,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The twin of [`few_rows_product`]."""
    values, of_rows = x if isinstance(x, Float8Rows) else (x, 1.0)
    out = values.float() @ weight.float().T * of_rows * scales.T
    return (out if bias is None else out + bias.float()).to(dtype)


def few_rows_product(
    x: torch.Tensor | Float8Rows,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x @ (weight * scales).T + bias`, summed in float32 and rounded once.

    Args:
        x: `(..., size)`, contiguous: [`Float8Rows`] for weights in float8, bfloat16 or float16 for weights in int8.
        weight: `(outputs, size)` float8_e4m3fn or int8, contiguous.
        scales: `(outputs, 1)` float32, contiguous.
        bias: `(outputs,)`, or None.
        dtype: of the result, `(..., outputs)`.
    """
    is_float8 = isinstance(x, Float8Rows)
    values, of_rows = x if isinstance(x, Float8Rows) else (x, scales)  # unused scales
    outputs, size = weight.shape
    rows = values.numel() // size
    tiles = tiles_of(rows, outputs, weight.dtype)
    out = torch.empty(*values.shape[:-1], outputs, dtype=dtype, device=weight.device)
    _few_rows_product[(triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.outputs))](
        values, of_rows, weight, scales, scales if bias is None else bias, out, rows, outputs, size,
        IS_FLOAT8=is_float8, HAS_BIAS=bias is not None, IS_TURNED=tiles.is_turned, IS_EVEN=size % tiles.size == 0,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=tiles.size, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["rows"])
    def _few_rows_product(
        x, x_scales, weight, scales, bias, out, rows, outputs, size,
        IS_FLOAT8: tl.constexpr, HAS_BIAS: tl.constexpr, IS_TURNED: tl.constexpr, IS_EVEN: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        exists, is_output = row < rows, output < outputs
        inner = tl.arange(0, BLOCK_K)
        x_tile = x + row[:, None].to(tl.int64) * size + inner
        weight_tile = weight + output[:, None].to(tl.int64) * size + inner
        if IS_TURNED:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, size, BLOCK_K):
            if IS_EVEN:
                left = tl.load(x_tile + start, mask=exists[:, None], other=0.0)
                right = tl.load(weight_tile + start, mask=is_output[:, None], other=0.0, eviction_policy="evict_first")
            else:
                inside = start + inner < size
                left = tl.load(x_tile + start, mask=exists[:, None] & inside, other=0.0)
                right = tl.load(weight_tile + start, mask=is_output[:, None] & inside, other=0.0)
            right = right.to(left.dtype)
            if IS_TURNED:
                total = tl.dot(right, tl.trans(left), total)
            else:
                total = tl.dot(left, tl.trans(right), total)
        if IS_TURNED:
            total = tl.trans(total)
        total *= tl.load(scales + output, mask=is_output, other=0.0)
        if IS_FLOAT8:
            total *= tl.load(x_scales + row, mask=exists, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)
        inside = exists[:, None] & is_output
        target = out + row[:, None].to(tl.int64) * outputs + output
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)
