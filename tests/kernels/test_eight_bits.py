"""Rows and weights in 8 bits: each kernel against its torch twin, which is tested against torchao."""

import pytest
import torch

pytest.importorskip("triton")

from dllm_hf.kernels import products
from dllm_hf.kernels.layers import (
    Float8Rows,
    add_rms_norm,
    add_rms_norm_torch,
    quantize_rows,
    quantize_rows_torch,
    swiglu,
    swiglu_torch,
)
from dllm_hf.kernels.products import MAX_ROWS, Tiles, few_rows_product, few_rows_product_torch, tiles_of

from .test_kernels import DEVICE, ON_GPU, random

# The interpreter cuts off what bfloat16 has no room for, and has no way from int8 to it.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHORT = torch.bfloat16 if ON_GPU else torch.float16
ON_FLOAT8 = not ON_GPU or torch.cuda.get_device_capability() >= (8, 9)

pytestmark = pytest.mark.skipif(not ON_FLOAT8, reason="needs a GPU that knows float8")


def same_rows(got: Float8Rows, expected: Float8Rows):
    """A value that lies between two may be rounded to either, where what it comes from was rounded otherwise."""
    assert got.values.shape == expected.values.shape and got.scales.shape == expected.scales.shape
    torch.testing.assert_close(got.scales, expected.scales, rtol=1e-2, atol=0)
    one, other = (rows.values.float() * rows.scales for rows in (got, expected))
    assert (one - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("size", [16, 200, 4096])
def test_rows_in_8_bits(size):
    x = random(3, 2, size, dtype=DTYPE)
    x[1, 0] = 0  # as attention gives where nothing is seen
    x[2, 1] *= 1e6
    got = quantize_rows(x)
    same_rows(got, quantize_rows_torch(x))
    assert (got.values[1, 0].float() == 0).all()
    error = (got.values.float() * got.scales - x.float()).abs()
    assert (error <= x.float().abs() / 15 + got.scales / 256).all()


@pytest.mark.parametrize("rounds_once", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norms_in_8_bits(has_residual, rounds_once):
    x, weight = random(3, 5, 176, dtype=DTYPE), random(176, dtype=DTYPE)
    arguments = (x, random(3, 5, 176, dtype=DTYPE, seed=1) if has_residual else None, weight, 1e-6, rounds_once, True)
    (got, total), (expected, expected_total) = add_rms_norm(*arguments), add_rms_norm_torch(*arguments)
    same_rows(got, expected)
    torch.testing.assert_close(total, expected_total)


@pytest.mark.parametrize("size", [24, 1200])
def test_the_gate_in_8_bits(size):
    gate, up = random(2, 3, 2 * size, dtype=DTYPE).chunk(2, dim=-1)
    same_rows(swiglu(gate, up, True), swiglu_torch(gate, up, True))


def weights_of(outputs: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scales = random(outputs, size, seed=1), random(outputs, 1, seed=2).abs() / 100
    return (weight.clamp(-3, 3) * 40).to(dtype), scales


def product_case(rows: int, outputs: int, size: int, dtype: torch.dtype, has_bias: bool = False):
    x = random(rows, size, dtype=SHORT)
    x = quantize_rows_torch(x) if dtype != torch.int8 else x
    bias = random(outputs, dtype=SHORT, seed=3) if has_bias else None
    arguments = (x, *weights_of(outputs, size, dtype), bias, SHORT if ON_GPU else torch.float32)
    got, expected = few_rows_product(*arguments), few_rows_product_torch(*arguments)
    assert got.shape == (rows, outputs) and got.dtype == expected.dtype
    assert (got.float() - expected.float()).norm() < (4e-3 if ON_GPU else 1e-5) * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("rows", "outputs", "size"),
    [(1, 48, 256), (4, 33, 272), (17, 64, 80), (33, 100, 512), (64, 16, 256), (100, 32, 48)],
)
def test_products_of_a_few_rows(rows, outputs, size, dtype):
    product_case(rows, outputs, size, dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_products_with_a_bias(dtype):
    product_case(5, 40, 64, dtype, has_bias=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_the_weights_may_be_the_left_factor(dtype, monkeypatch):
    monkeypatch.setattr(products, "tiles_of", lambda *_: Tiles(16, 64, 64, 4, 3, True))
    product_case(5, 72, 144, dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_row_is_the_same_in_any_company(dtype):
    """To the last bit where tensor cores do not sum: a row is cut in the same way for any number of rows."""
    most = MAX_ROWS[dtype] if ON_GPU else 20
    assert len({tiles_of(rows, 4096, dtype).size for rows in range(1, MAX_ROWS[dtype] + 1)}) == 1
    x, weight = random(most, 512, dtype=SHORT), weights_of(64, 512, dtype)
    whole = quantize_rows(x) if dtype != torch.int8 else x
    alone = quantize_rows(x[3:4]) if dtype != torch.int8 else x[3:4]
    got, expected = (few_rows_product(each, *weight, None, torch.float32) for each in (whole, alone))
    if ON_GPU:  # whose sums of products in 8 bits keep some 14 bits
        assert (got[3:4] - expected).norm() < 2e-3 * expected.norm()
    else:
        assert torch.equal(got[3:4], expected)


def test_what_is_behind_the_rows_is_not_read():
    x = torch.full((20, 64), float("nan"), dtype=SHORT, device=DEVICE)
    x[:3] = random(3, 64, dtype=SHORT)
    weight, scales = weights_of(32, 64, torch.int8)
    got = few_rows_product(x[:3], weight, scales, None, SHORT)
    assert torch.isfinite(got).all()
