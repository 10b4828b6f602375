"""What a layer computes between its matrix products: norms, rotary positions, the writes to the cache, the gate; each row in 8
bits where the next product takes it so.

The kernels round where the layers of `transformers` (and PyTorch's norm) round, so that both paths agree in bfloat16 too;
only the rotation is rounded once instead of three times.
"""

from typing import Any, NamedTuple

import torch

from .eight_bits import LARGEST_FLOAT8, quantised
from .triton import tl, triton

HEADS_PER_PROGRAM = 8


class Float8Rows(NamedTuple):
    """Rows in 8 bits: `values * scales` is what they stand for.

    Attributes:
        values: `(..., size)` float8_e4m3fn, contiguous.
        scales: `(..., 1)` float32, of each row, so that a row does not depend on the others.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> "Float8Rows":
        scales = torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device)
        return cls(torch.empty(shape, dtype=torch.float8_e4m3fn, device=device), scales)


def quantize_rows_torch(x: torch.Tensor) -> Float8Rows:
    """The twin of [`quantize_rows`]."""
    # As torchao's, the scale is rounded to the type of `x`. It divides zeros by a scale of zero.
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8).float()
    wide = x.float() * (1.0 / scales.where(scales > 0, 1.0))
    return Float8Rows(wide.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn), scales)


def quantize_rows(x: torch.Tensor) -> Float8Rows:
    """Rows in 8 bits, each with the scale that makes its largest value the largest of 8 bits, as torchao quantises the input
    of a product.

    Args:
        x: `(..., size)`, contiguous.
    """
    rows, size = Float8Rows.empty(x.shape, x.device), x.shape[-1]
    block = triton.next_power_of_2(size)
    _quantize_rows[(x.numel() // size,)](x, *rows, size, BLOCK=block, num_warps=16 if block > 8192 else 8)
    return rows


def add_rms_norm_torch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    rounds_once: bool = False,
    quantizes: bool = False,
) -> tuple[Any, torch.Tensor]:
    """The twin of [`add_rms_norm`]."""
    total = x if residual is None else residual + x
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (weight.float() * normed).to(x.dtype) if rounds_once else weight * normed.to(x.dtype)
    return (quantize_rows_torch(normed) if quantizes else normed), total


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    rounds_once: bool = False,
    quantizes: bool = False,
) -> tuple[Any, torch.Tensor]:
    """`total = x + residual` and its RMS norm (arXiv:1910.07467).

    Args:
        x, residual: `(..., size)`, contiguous; without a residual the total is `x` itself.
        weight: `(size,)`.
        rounds_once: whether to round after the weight only, as `torch.nn.RMSNorm`, or before it too, as `transformers`.
        quantizes: whether the norm is given in 8 bits, see [`quantize_rows`].

    Returns:
        The norm times `weight`, and the total.
    """
    size = x.shape[-1]
    rows = Float8Rows.empty(x.shape, x.device) if quantizes else None
    normed, scales = (torch.empty_like(x), x) if rows is None else rows  # unused scales
    total = x if residual is None else torch.empty_like(x)
    _add_rms_norm[(x.numel() // size,)](
        x, x if residual is None else residual, weight, normed, scales, total, size, eps,
        HAS_RESIDUAL=residual is not None, ROUNDS_ONCE=rounds_once, QUANTIZES=quantizes,
        BLOCK=triton.next_power_of_2(size), num_warps=8 if size > 1024 else 4,
    )  # fmt: skip
    return normed if rows is None else rows, total


def swiglu_torch(gate: torch.Tensor, up: torch.Tensor, quantizes: bool = False) -> Any:
    """The twin of [`swiglu`]."""
    activated = torch.nn.functional.silu(gate) * up
    return quantize_rows_torch(activated) if quantizes else activated


def swiglu(gate: torch.Tensor, up: torch.Tensor, quantizes: bool = False) -> Any:
    """`silu(gate) * up` (arXiv:2002.05202).

    Args:
        gate, up: `(batch, window, size)`, the last dimension contiguous, tokens at equal distances.
        quantizes: whether it is given in 8 bits, see [`quantize_rows`].

    Returns:
        The same shape, contiguous.
    """
    batch, window, size = gate.shape
    out = torch.empty(batch, window, size, dtype=gate.dtype, device=gate.device)
    block = 1024
    grid = batch * window, triton.cdiv(size, block)
    maxima = torch.empty(grid, dtype=torch.float32, device=gate.device) if quantizes else out
    _swiglu[grid](
        gate, up, out, maxima, size, gate.stride(1), up.stride(1), QUANTIZES=quantizes, BLOCK=block, num_warps=4
    )
    if quantizes:  # by a second kernel: one program for a whole row would take longer than both
        rows = Float8Rows.empty(gate.shape, gate.device)
        _quantize_parts[grid](
            out, maxima, *rows, size, BLOCK=block, BLOCK_PARTS=triton.next_power_of_2(grid[1]), num_warps=4
        )
        return rows
    return out


def rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv:2104.09864, the halves as in the library), rounded once.

    Args:
        x: `(batch, window, heads, head_dim)`.
        cos, sin: `(batch, window, rotated)`, for the first dimensions of a head; the others stay as they are.
    """
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.float().chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    rotated = (rotated.float() * cos[:, :, None].float() + half * sin[:, :, None].float()).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def rotate_and_store_torch(
    query, key, value, cos, sin, columns, keys, values, query_norm=None, key_norm=None, eps=0.0, scales=None,
    encoding=None,
) -> torch.Tensor:  # fmt: skip
    """The twin of [`rotate_and_store`]."""
    batch, window = query.shape[:2]
    head_dim = keys.shape[-1]

    def rotated(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.view(batch, window, -1, head_dim)
        if weight is not None:
            x = add_rms_norm_torch(x, None, weight, eps)[0]
        return rotate_torch(x, cos, sin)

    both = (keys, rotated(key, key_norm)), (values, value.view(batch, window, -1, head_dim))
    for number, (arena, states) in enumerate(both):
        states = states.permute(2, 0, 1, 3)
        if encoding is not None:
            states, scales[:, columns, number] = quantised(states, encoding, is_key=number == 0)
        arena[:, columns] = states
    return rotated(query, query_norm)


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    columns: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scales: torch.Tensor | None = None,
    encoding: str | None = None,
) -> torch.Tensor:
    """Norm (where there is one) and rotary position of queries and keys, see [`rotate_torch`]; keys and values go into
    their columns of the cache.

    Args:
        query: `(batch, window, heads * head_dim)`; `key` and `value`: `(batch, window, kv_heads * head_dim)`. The last
            dimension contiguous, tokens at equal distances.
        cos, sin: `(batch, window, rotated)`, contiguous, for the first dimensions of a head; the others are not rotated.
        columns: `(batch, window)` int64, of the arena. Where one repeats, so must its key and value.
        keys, values: `(kv_heads, columns, head_dim)`, the arena, written in place.
        query_norm, key_norm: `(head_dim,)`, the weights of norms over each head; `eps` is theirs.
        encoding: in which keys and values are stored, where they are in 8 bits (uint8), see [`eight_bits`].
        scales: `(kv_heads, columns, 2)` bfloat16, contiguous, of keys and of values, written in place, with an encoding.

    Returns:
        The queries, `(batch, window, heads, head_dim)`.
    """
    batch, window = query.shape[:2]
    kv_heads, _, head_dim = keys.shape
    heads = query.shape[2] // head_dim
    columns = columns.contiguous()  # may be one row, expanded to the batch
    rotated = torch.empty(batch, window, heads, head_dim, dtype=query.dtype, device=query.device)
    if encoding == "fp8":
        keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    together = min(HEADS_PER_PROGRAM, triton.next_power_of_2(kv_heads))
    programs = triton.cdiv(heads, together) + 2 * triton.cdiv(kv_heads, together)
    _rotate_and_store[(batch * window, programs)](
        query, key, value, cos, sin, columns, rotated, keys, values,
        keys if scales is None else scales,
        query if query_norm is None else query_norm, key if key_norm is None else key_norm, eps,
        heads, kv_heads, query.stride(1), key.stride(1), value.stride(1), *keys.stride()[:2], *values.stride()[:2],
        keys.shape[1],
        HALF=head_dim // 2, ROTATED=cos.shape[-1] // 2, BLOCK=triton.next_power_of_2(head_dim // 2), HEADS=together,
        HAS_NORM=query_norm is not None, ENCODING=encoding, num_warps=4,
    )  # fmt: skip
    return rotated


if triton is not None:

    @triton.jit
    def _store_float8(row, largest, dtype: tl.constexpr, values, scales, index, inside, size):
        """Store a row, or a part of it, in 8 bits, and its scale. `largest`: magnitude of the whole row."""
        scale = (largest / 448.0).to(dtype).to(tl.float32)
        token = tl.program_id(0).to(tl.int64)
        # The scale may be rounded down: the largest value is kept from becoming none. One division, and not one for each.
        row = tl.clamp(row * tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), -448.0, 448.0)
        tl.store(values + token * size + index, row.to(tl.float8e4nv), mask=inside)
        tl.store(scales + token, scale)

    @triton.jit
    def _quantize_rows(x, values, scales, size, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        inside = index < size
        row = tl.load(x + tl.program_id(0).to(tl.int64) * size + index, mask=inside, other=0.0)
        wide = row.to(tl.float32)
        _store_float8(wide, tl.max(tl.abs(wide), 0), row.dtype, values, scales, index, inside, size)

    @triton.jit
    def _add_rms_norm(
        x, residual, weight, normed, scales, total, size, eps,
        HAS_RESIDUAL: tl.constexpr, ROUNDS_ONCE: tl.constexpr, QUANTIZES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * size
        index = tl.arange(0, BLOCK)
        inside = index < size
        values = tl.load(x + row + index, mask=inside, other=0.0)
        dtype = values.dtype
        if HAS_RESIDUAL:
            other = tl.load(residual + row + index, mask=inside, other=0.0)
            values = (other.to(tl.float32) + values.to(tl.float32)).to(dtype)
            tl.store(total + row + index, values, mask=inside)
        values = values.to(tl.float32)
        scale = tl.rsqrt((tl.sum(values * values, 0) / size + eps).to(tl.float32))  # Inductor passes `eps` as fp64
        factor = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
        result = values * scale
        if not ROUNDS_ONCE:
            result = result.to(dtype).to(tl.float32)
        result *= factor
        if QUANTIZES:
            result = result.to(dtype).to(tl.float32)
            _store_float8(result, tl.max(tl.abs(result), 0), dtype, normed, scales, index, inside, size)
        else:
            tl.store(normed + row + index, result.to(dtype), mask=inside)

    @triton.jit
    def _swiglu(
        gate, up, out, maxima, size, gate_token, up_token, QUANTIZES: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """With `QUANTIZES` also the largest magnitude of the part."""
        token = tl.program_id(0).to(tl.int64)
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        left = tl.load(gate + token * gate_token + index, mask=inside, other=0.0)
        right = tl.load(up + token * up_token + index, mask=inside, other=0.0).to(tl.float32)
        wide = left.to(tl.float32)
        activated = (wide / (1.0 + tl.exp(-wide))).to(left.dtype).to(tl.float32)
        result = (activated * right).to(left.dtype)
        tl.store(out + token * size + index, result, mask=inside)
        if QUANTIZES:
            largest = tl.max(tl.abs(result.to(tl.float32)), 0)
            tl.store(maxima + token * tl.num_programs(1) + tl.program_id(1), largest)

    @triton.jit
    def _quantize_parts(x, maxima, values, scales, size, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr):
        """A part of a row of which the largest magnitude of each part is known."""
        token, parts = tl.program_id(0).to(tl.int64), tl.num_programs(1)
        part = tl.arange(0, BLOCK_PARTS)
        largest = tl.max(tl.load(maxima + token * parts + part, mask=part < parts, other=0.0), 0)
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        row = tl.load(x + token * size + index, mask=inside, other=0.0)
        _store_float8(row.to(tl.float32), largest, row.dtype, values, scales, index, inside, size)

    @triton.jit
    def _largest(x):
        """The bits of the largest magnitude of each row: a NaN has larger ones than any number."""
        return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)

    @triton.jit
    def _scale_of(largest, ENCODING: tl.constexpr, IS_KEY: tl.constexpr):
        """The twin of what [`eight_bits.quantised`] does. `largest`: see [`_largest`]."""
        number = largest.to(tl.float32, bitcast=True)
        bits = tl.div_rn(number, 448.0 if ENCODING == "fp8" else 127.0).to(tl.int32, bitcast=True)
        if ENCODING == "int8" and IS_KEY:
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0x7FFF0000
        else:
            bits = (bits + 0x7FFFFF) & 0x7F800000
        bits = tl.where(largest < 0x7F800000, tl.maximum(bits, 226492416), 0x7FC00000)  # `SMALLEST`, NaN
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _bytes(x):
        """Whole numbers as bytes that are 128 more: 1.5 * 2**23 has no room for fractions, so that the sum is rounded to even.
        The limits also keep product and sum from being fused, which would be rounded otherwise than those of the twin."""
        return (tl.clamp(x, -127.0, 127.0) + 12583040.0).to(tl.int32, bitcast=True).to(tl.uint8)

    @triton.jit
    def _store_heads(
        target, head_stride, column_stride, scales, column, columns, head, exists, one, two, first, second, inside,
        ENCODING: tl.constexpr, IS_KEY: tl.constexpr,
    ):  # fmt: skip
        """Two halves of a column's heads, `(HEADS, BLOCK)` each, as they are, or in 8 bits: see [`eight_bits.quantised`]."""
        if ENCODING is not None:
            first, second = first.to(tl.float32), second.to(tl.float32)
            scale = _scale_of(tl.maximum(_largest(first), _largest(second)), ENCODING, IS_KEY)
            tl.store(scales + (head.to(tl.int64) * columns + column) * 2, scale.to(tl.bfloat16), mask=exists)
            inverse = tl.div_rn(1.0, scale)[:, None]
            first, second = first * inverse, second * inverse
            if ENCODING == "int8":
                first, second = _bytes(first), _bytes(second)
        target += column * column_stride + head[:, None].to(tl.int64) * head_stride
        tl.store(target + one, first.to(target.dtype.element_ty), mask=inside)
        tl.store(target + two, second.to(target.dtype.element_ty), mask=inside)

    # Not specialised: another number of columns, or place of theirs in memory, must not compile it again.
    @triton.jit(do_not_specialize=["columns", "number_of_columns"])
    def _rotate_and_store(
        query, key, value, cos, sin, columns, rotated, keys, values, scales, query_norm, key_norm, eps,
        heads, kv_heads, query_token, key_token, value_token,
        key_head, key_column, value_head, value_column, number_of_columns,
        HALF: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
        ENCODING: tl.constexpr,
    ):  # fmt: skip
        """A few heads of one token: of the queries, then of the keys, then of the values."""
        token, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
        of_queries, of_keys = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
        index, each = tl.arange(0, BLOCK), tl.arange(0, HEADS)
        # Pairs of dimensions: the two halves of what is rotated, then those of the rest.
        one = tl.where(index < ROTATED, index, index + ROTATED)
        two = tl.where(index < ROTATED, index + ROTATED, index + HALF)
        column = tl.load(columns + token)
        if number >= of_queries + of_keys:
            head = (number - of_queries - of_keys) * HEADS + each
            inside = (head < kv_heads)[:, None] & (index < HALF)
            # Triton takes a variable of two branches for one: of the same shapes and types as below.
            source = value + token * value_token + head[:, None] * 2 * HALF
            low = tl.load(source + index, mask=inside, other=0.0)
            high = tl.load(source + index + HALF, mask=inside, other=0.0)
            _store_heads(
                values, value_head, value_column, scales + 1, column, number_of_columns, head, head < kv_heads,
                index, index + HALF, low, high, inside, ENCODING, False,
            )  # fmt: skip
        else:
            if number < of_queries:
                head = number * HEADS + each
                inside = (head < heads)[:, None] & (index < HALF)
                source = query + token * query_token + head[:, None] * 2 * HALF
                weight = query_norm
            else:
                head = (number - of_queries) * HEADS + each
                inside = (head < kv_heads)[:, None] & (index < HALF)
                source = key + token * key_token + head[:, None] * 2 * HALF
                weight = key_norm
            first = tl.load(source + one, mask=inside, other=0.0)
            second = tl.load(source + two, mask=inside, other=0.0)
            dtype = first.dtype
            first, second = first.to(tl.float32), second.to(tl.float32)
            real = index < HALF
            if HAS_NORM:
                square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
                scale = tl.rsqrt((square / (2 * HALF) + eps).to(tl.float32))[:, None]
                left = tl.load(weight + one, mask=real, other=0.0).to(tl.float32)
                right = tl.load(weight + two, mask=real, other=0.0).to(tl.float32)
                first = ((first * scale).to(dtype).to(tl.float32) * left).to(dtype).to(tl.float32)
                second = ((second * scale).to(dtype).to(tl.float32) * right).to(dtype).to(tl.float32)
            angle, turns = token * 2 * ROTATED + index, index < ROTATED
            cos1 = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
            cos2 = tl.load(cos + ROTATED + angle, mask=turns, other=1.0).to(tl.float32)
            sin1 = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
            sin2 = tl.load(sin + ROTATED + angle, mask=turns, other=0.0).to(tl.float32)
            turned1, turned2 = (first * cos1 - second * sin1).to(dtype), (second * cos2 + first * sin2).to(dtype)
            if number < of_queries:
                target = rotated + token * heads * 2 * HALF + head[:, None] * 2 * HALF
                tl.store(target + one, turned1, mask=inside)
                tl.store(target + two, turned2, mask=inside)
            else:
                _store_heads(
                    keys, key_head, key_column, scales, column, number_of_columns, head, head < kv_heads,
                    one, two, turned1, turned2, inside, ENCODING, True,
                )  # fmt: skip
