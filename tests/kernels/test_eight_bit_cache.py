"""Keys and values in 8 bits: each kernel against its torch twin, as in test_kernels.py."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from dllm_hf.fused.stack import FusedStack
from dllm_hf.generation import cache_layers
from dllm_hf.generation.backend import ModelBackend
from dllm_hf.kernels.attention import canvas_attention, canvas_attention_torch
from dllm_hf.kernels.columns import copy_columns, copy_columns_torch
from dllm_hf.kernels.eight_bits import ENCODINGS, LARGEST_FLOAT8, dequantised, quantised
from dllm_hf.kernels.layers import rotate_and_store, rotate_and_store_torch

from ..builders import as_list, new_model, pairwise, window_of
from .test_kernels import DEVICE, attention_of_long_canvases, close, random

NAN = 0x7F  # of float8_e4m3fn; int8 has none
# What a number may be off where it was rounded otherwise before: a number on the other side is one of 16 away, or one step.
APART = {"fp8": {"rtol": 0.15, "atol": 0.02}, "int8": {"rtol": 0.01, "atol": 0.1}}
rows_of_numbers = st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=9)


@pytest.fixture(params=ENCODINGS)
def encoding(request) -> str:
    return request.param


def arena(kv_heads, columns, head_dim, encoding, spread=3.0):
    """Keys and values that differ in size from column to column, in 8 bits; and their scales."""
    sizes = torch.exp(spread * random(kv_heads, columns, 1, seed=7))
    (keys, of_keys), (values, of_values) = (
        quantised(random(kv_heads, columns, head_dim, seed=seed) * each, encoding, is_key=seed == 1)
        for seed, each in ((1, 1.0), (2, sizes))
    )
    return keys, values, torch.stack([of_keys, of_values], dim=-1)


def poisoned(keys, values, scales, unseen):
    """Copies in which nothing is left of the columns that are not seen."""
    keys, values, scales = keys.clone(), values.clone(), scales.clone()
    keys[:, unseen], values[:, unseen], scales[:, unseen] = NAN, NAN, float("nan")
    return keys, values, scales


def there_and_back(numbers: list[float], encoding: str, is_key: bool) -> tuple[torch.Tensor, ...]:
    """The numbers, their bytes and scales, and what is read of these."""
    x = torch.tensor([numbers])
    in_bytes, scales = quantised(x, encoding, is_key)
    assert (in_bytes.dtype, scales.dtype, in_bytes.shape, scales.shape) == (torch.uint8, torch.bfloat16, x.shape, (1,))
    return x, in_bytes, scales, dequantised(in_bytes, scales, torch.float32, encoding)


@given(rows_of_numbers, st.booleans())
def test_a_number_in_fp8_keeps_four_significant_bits_or_is_tiny_beside_the_largest(numbers, is_key):
    x, in_bytes, scales, again = there_and_back(numbers, "fp8", is_key)
    largest = x.abs().amax()
    # Half of the last bit, or half of the smallest number that 8 bits have: at most 2**-10 in units of the scale.
    allowed = torch.maximum(x.abs() / 16, largest / (LARGEST_FLOAT8 / 2) * 2**-10).clamp(min=2.0**-110)
    assert ((again - x).abs() <= allowed).all()
    assert torch.equal(dequantised(*quantised(again, "fp8", is_key), torch.float32, "fp8"), again)
    assert torch.equal(dequantised(in_bytes, scales, torch.bfloat16, "fp8").float(), again)  # nothing else is rounded


@given(rows_of_numbers, st.booleans())
def test_a_number_in_int8_is_at_most_half_a_step_off(numbers, is_key):
    """Keys have 127 steps to the largest number, up to the rounding of the scale, which has 8 bits; values at least 64."""
    x, in_bytes, scales, again = there_and_back(numbers, "int8", is_key)
    step, exact = scales[:, None].double(), x.abs().amax().double() / 127
    assert ((again - x).abs() <= step / 2 * (1 + 1e-5)).all() and (in_bytes > 0).all()
    assert (step <= (exact * (1 + 2**-8 if is_key else 2)).clamp(min=2.0**-100)).all()
    if not is_key:
        assert torch.equal(
            dequantised(in_bytes, scales, torch.bfloat16, "int8").float(), again
        )  # nothing else is rounded


@pytest.mark.parametrize("is_key", [False, True])
def test_zeros_stay_zeros_and_a_head_with_a_nan_or_an_infinity_is_nan(encoding, is_key):
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("-inf"), 1.0]])
    again = dequantised(*quantised(x, encoding, is_key), torch.float32, encoding)
    assert (again[0] == 0).all() and again[1:].isnan().all()


@pairwise(
    sizes=[(2, 2, 64), (4, 1, 96), (7, 1, 128), (2, 2, 8)],  # heads, kv_heads, head_dim
    part=[1, 0.5],  # of a head that is rotated
    has_norm=[False, True],
    dtype=[torch.float32, torch.bfloat16],
    encoding=[*ENCODINGS],
)
def test_rotated_keys_and_values_are_stored_in_8_bits(sizes, part, has_norm, dtype, encoding):
    heads, kv_heads, head_dim = sizes
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    query, key, value = random(2, 3, sum(sizes), dtype=dtype).split(sizes, dim=-1)  # of one product
    value = value * torch.tensor([1e-4, 0.0, 300.0], device=DEVICE, dtype=dtype)[:, None]
    value[1, :, 3] = torch.tensor([float("nan"), float("inf"), 1.0], device=DEVICE)
    cos, sin = (random(2, 3, int(head_dim * part), dtype=dtype, seed=seed) for seed in (3, 4))
    columns = torch.tensor([[0, 7, 19], [24, 25, 26]], device=DEVICE)
    norms = [random(head_dim, dtype=dtype, seed=seed) if has_norm else None for seed in (5, 6)]
    results = []
    for function in (rotate_and_store, rotate_and_store_torch):
        keys, values = torch.full((2, kv_heads, 40, head_dim), NAN, dtype=torch.uint8, device=DEVICE)
        scales = torch.full((kv_heads, 40, 2), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        rotated = function(query, key, value, cos, sin, columns, keys, values, *norms, 1e-6, scales, encoding)
        close(rotated, results[0][0] if results else rotated, dtype)
        results.append((rotated, keys[:, columns], values[:, columns], scales[:, columns]))
        unwritten = torch.ones(40, dtype=torch.bool).index_fill_(0, columns.flatten().cpu(), False).to(DEVICE)
        assert scales[:, unwritten].isnan().all() and (keys[:, unwritten] == NAN).all()
    (_, keys, values, scales), (_, twins_keys, twins_values, twins_scales) = results
    holds = scales[..., 1].isfinite()
    assert torch.equal(values[holds], twins_values[holds])  # to the last bit
    torch.testing.assert_close(scales[..., 1], twins_scales[..., 1], rtol=0, atol=0, equal_nan=True)
    assert holds[:, 0].all() and holds[:, 1].tolist() == [[False, False, True], *[[True] * 3] * (kv_heads - 1)]
    of_keys = (
        dequantised(*each, torch.float32, encoding)
        for each in ((keys, scales[..., 0]), (twins_keys, twins_scales[..., 0]))
    )
    torch.testing.assert_close(*of_keys, **APART[encoding])


@pytest.mark.parametrize(
    ("groups", "head_dim", "dtype", "encoding"),
    [(1, 128, torch.float32, "fp8"), (1, 8, torch.bfloat16, "int8"), (4, 64, torch.float32, "int8")]
    + [(7, 96, torch.bfloat16, "fp8"), (8, 8, torch.float32, "fp8"), (8, 128, torch.bfloat16, "int8")],
)
def test_attention_reads_8_bits(groups, head_dim, dtype, encoding):
    """With columns between and behind what is seen that hold no numbers."""
    held, base = arena(2, 500, head_dim, encoding), torch.tensor([210, 3], device=DEVICE)
    lengths = torch.tensor([[150, 170, 180, 1], [131] * 4], dtype=torch.int32, device=DEVICE)
    unseen = torch.ones(500, dtype=torch.bool, device=DEVICE)
    unseen[3:134] = unseen[210:390] = False
    query = random(2, 4, 2 * groups, head_dim, dtype=dtype)
    keys, values, scales = poisoned(*held, unseen)
    places = (lengths, base, 300, head_dim**-0.5)
    got = canvas_attention(query, keys, values, *places, scales=scales, encoding=encoding)
    expected = canvas_attention_torch(query.double(), *held[:2], *places, scales=held[2], encoding=encoding)
    close(got, expected, dtype)
    close(got, canvas_attention_torch(query, keys, values, *places, scales=scales, encoding=encoding), dtype)


@pytest.mark.parametrize("has_large_queries", [False, True])
def test_numbers_that_float16_does_not_hold_are_read_too(has_large_queries, encoding):
    """The kernel multiplies in float16, but for float32 models."""
    keys, values = 3e5 * random(1, 90, 64), 1e-6 * random(1, 90, 64, seed=1)
    values[:, ::7] = 0  # as of columns that attention goes to where it has nothing to look for
    query = (1e6 if has_large_queries else 1e-9) * random(1, 3, 2, 64, dtype=torch.bfloat16, seed=2)
    (keys, of_keys), (values, of_values) = quantised(keys, encoding, True), quantised(values, encoding, False)
    lengths, base = (
        torch.full((1, 3), 90, dtype=torch.int32, device=DEVICE),
        torch.zeros(1, dtype=torch.long, device=DEVICE),
    )
    arguments = (keys, values, lengths, base, 90, 1e-11 if has_large_queries else 1e3)
    places = {"scales": torch.stack([of_keys, of_values], dim=-1), "encoding": encoding}
    got = canvas_attention(query, *arguments, **places)
    close(got, canvas_attention_torch(query.double(), *arguments, **places), torch.bfloat16)


@pytest.mark.parametrize(
    ("groups", "dtype", "encoding"),
    [(1, torch.float32, "int8"), (4, torch.bfloat16, "int8"), (1, torch.bfloat16, "fp8")],
)
def test_runs_of_a_list_read_8_bits_where_they_stand(groups, dtype, encoding):
    """In bfloat16 short and long ones in tiles of two sizes."""
    keys, values, scales = arena(2, 900, 64, encoding)
    query = random(1, 60, 2 * groups, 64, dtype=dtype)
    lengths = torch.randint(0, 290, (1, 60), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    base = torch.tensor([333, 0, 5, 333, 600], device=DEVICE)
    runs = torch.tensor([[9, 40, 3], [9, 0, 0], [9, 0, 40], [9, 43, 1], [9, 44, 16]], device=DEVICE)
    shared = torch.tensor([[33, 0, 500, 33, 0], [100, 0, 37, 100, 0]], device=DEVICE)
    own = torch.tensor([[120, 0, 8, 0, 60], [124, 0, 12, 0, 64], [890, 0, 880, 0, 870]], device=DEVICE)  # of drafts
    arguments = (keys, values, lengths, base, 300, 0.1, runs, 64)
    places = {"shared": shared, "own": own, "scales": scales, "encoding": encoding}
    expected = canvas_attention_torch(query, *arguments, **places)
    close(canvas_attention(query, *arguments, **places), expected, dtype)


@pytest.mark.parametrize("width", [64, 300])  # in one part and in several
@pytest.mark.parametrize("of_values", [0, 1])
@pytest.mark.parametrize("kind", [None, *ENCODINGS])
def test_a_nan_is_not_hidden_from_those_who_see_its_column(kind, of_values, width):
    """Of keys or values, in either path, and of those in the model's type too."""
    both = [random(1, width, 32, seed=seed) for seed in (1, 2)]
    both[of_values][0, 30, 5] = float("nan")
    places = {}
    if kind is not None:
        (both[0], of_keys), (both[1], of_values) = map(quantised, both, [kind] * 2, [True, False])
        places = {"scales": torch.stack([of_keys, of_values], dim=-1), "encoding": kind}
    lengths = torch.tensor([[31, width]], dtype=torch.int32, device=DEVICE)
    for attend in (canvas_attention, canvas_attention_torch):
        base = torch.zeros(1, dtype=torch.long, device=DEVICE)
        got = attend(random(1, 2, 1, 32), *both, lengths, base, width, 0.1, **places)
        assert got.isnan().any(-1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "groups"), [(32, 1), (8, 4), (4, 7), (4, 8)])
def test_attention_of_real_shapes_in_8_bits(width, dtype, kv_heads, groups, encoding):
    for batch, window in ((1, 32), (8, 32), (2, 4)):
        canvases = batch + kv_heads - 1
        held = arena(1, canvases * width, 128, encoding, spread=1.0)
        spoilt = poisoned(*held, torch.arange(canvases * width, device=DEVICE) % width >= width - 5)
        query = random(batch, window, kv_heads * groups, 128, dtype=dtype)
        attention_of_long_canvases(query, *spoilt[:2], kv_heads, width, width - 5, spoilt[2], held, encoding)


def test_columns_are_copied_with_their_scales():
    runs = torch.tensor([(10, 200, 70), (10, 300, 33), (10, 390, 1), (90, 350, 2)], device=DEVICE)
    for each in arena(3, 400, 96, "int8"):
        expected, before = each.clone(), each.clone()
        copy_columns_torch(expected, runs, 70)
        copy_columns(each, runs, 70)
        assert torch.equal(each, expected) and not torch.equal(each, before)


# With biases, and with norms of queries and keys.
@pytest.mark.parametrize(("family", "encoding"), [("dream", "int8"), ("sdar_moe", "fp8")])
def test_a_decoder_on_the_kernels_reads_what_its_own_pass_has_written_in_8_bits_as_the_plain_path(
    family, encoding, monkeypatch
):
    for name in ("rotate_and_store", "canvas_attention"):
        monkeypatch.setattr(cache_layers, f"{name}_torch", getattr(cache_layers, name))
    model = new_model(family).to(DEVICE)
    tokens = torch.randint(60, (2, 8), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    window = window_of(torch.arange(8, device=DEVICE).expand(2, 8), torch.tensor([[0, 3, 7], [1, 1, 2]], device=DEVICE))
    with torch.no_grad():
        plain, stack = ModelBackend(model, True, cache_dtype=encoding), FusedStack.of(model)
        expected, cache = plain(tokens, window, plain.open(2, 20)), plain.open(4, 20)
        stack.prepare(cache, 4)
        for layer in cache.layers:
            layer.keys.fill_(NAN), layer.values.fill_(NAN), layer.scales.fill_(float("nan"))
        logits = stack(tokens.flatten(), as_list(replace(window, slots=torch.tensor([3, 1], device=DEVICE))), cache)
        exact = model(tokens, logits_to_keep=window.keep, **({"block_size": 8} if family == "sdar_moe" else {})).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(logits, exact, atol=2e-4, rtol=1e-4)
