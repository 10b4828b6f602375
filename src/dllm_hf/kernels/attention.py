"""Attention of a few queries against the keys of a canvas, which are split over the processors of the GPU.

Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html) with two differences: the query heads that share
a key head are rows of one product, so that each key is read once, and every query has its own number of visible keys.

Rows that share the beginning of their canvases can read it together, as one run of queries: cascade attention
(Hydragen, https://arxiv.org/abs/2402.05099). What they read together is one more part of the keys.
"""

from typing import NamedTuple

import torch

from .eight_bits import dequantised
from .tiles import FEW, number_of_splits, number_of_stages, tile_of
from .triton import tl, triton

LOG2E = 1.4426950408889634


class Cascade(NamedTuple):
    """What the tokens of a list read together, of the beginnings that their rows share.

    Attributes:
        lengths: `(1, tokens)` int32, contiguous: a token reads so many columns of its piece's beginning in this way.
        base: `(pieces,)` int64, where the beginning of each piece stands in the arena.
        runs: `(pieces, 3)` int64, pieces of the list as the runs of [`canvas_attention`], but that a piece has tokens of several
            rows; some may be empty. Each token must be in one piece.
        longest: no piece has more tokens.
        skipped: `(runs,)` int64, contiguous, by run the number of columns that its tokens read in this way.
    """

    lengths: torch.Tensor
    base: torch.Tensor
    runs: torch.Tensor
    longest: int
    skipped: torch.Tensor


def place_in_arena(columns, base, shared, own=None) -> torch.Tensor:
    """The columns of an arena where `columns` of canvases stand, see [`canvas_attention`]; the arguments broadcast."""
    place = columns + (base if shared is None else torch.where(columns < shared[1], shared[0], base))
    if own is None:
        return place
    first, last, begin = own
    return torch.where((first <= columns) & (columns < last), begin + columns - first, place)


def canvas_attention_torch(
    query, keys, values, lengths, base, width, scale, runs=None, longest=0, shared=None, own=None, scales=None,
    encoding=None, cascade=None,
):  # fmt: skip
    """The twin of [`canvas_attention`]."""
    readings = _readings(lengths, base, runs, longest, shared, own, cascade)
    parts = [_part_torch(query, keys, values, (scales, encoding), width, scale, *reading) for reading in readings]
    if len(parts) == 1:
        return parts[0][0].to(query.dtype)
    results, sums = (torch.stack(each) for each in zip(*parts))
    return (results * sums.softmax(0).nan_to_num(0.0)[..., None]).sum(0).to(query.dtype)


def _readings(lengths, base, runs, longest, shared, own, cascade: Cascade | None) -> list[tuple]:
    """What is read for each row or run: these arguments, and how many columns are skipped; and what is read together."""
    if cascade is None:
        return [(lengths, base, runs, longest, shared, own, None)]
    return [(lengths, base, runs, longest, shared, own, cascade.skipped), (*cascade[:4], None, None, None)]


def _part_torch(
    query, keys, values, in_bytes, width, scale, lengths, base, runs, longest, shared, own, skipped
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of a reading, in float32 at least, and the logarithm of its weights' sum. `in_bytes`: scales and encoding."""
    if runs is not None:  # each run is a row of a rectangle
        tokens, inside = query.shape[1], torch.arange(longest, device=query.device)
        index = torch.where(inside < runs[:, 2:], runs[:, 1:2] + inside, tokens)
        padded, seen = query.new_zeros(tokens + 1, *query.shape[2:]), lengths.new_zeros(tokens + 1)
        padded[:tokens], seen[:tokens] = query[0], lengths[0]
        places = (seen[index], base, None, 0, shared, own, skipped)
        rows, sums = _part_torch(padded[index], keys, values, in_bytes, width, scale, *places)
        result, total = (x.new_zeros(tokens + 1, *x.shape[2:]).index_put_((index,), x) for x in (rows, sums))
        return result[None, :tokens], total[None, :tokens]
    columns = torch.arange(width, device=keys.device)
    shared, own = (None if each is None else each[..., None] for each in (shared, own))
    arena = place_in_arena(columns, base[:, None], shared, own)
    arena = arena.clamp(max=keys.shape[1] - 1)  # an extent at the end may be shorter
    # Keys that no query sees may hold anything, NaN too, which a weight of 0 would not remove.
    unread = (columns < (0 if skipped is None else skipped[:, None])) | (columns >= lengths.amax(-1)[:, None])
    unseen = unread[:, None, None] | (columns >= lengths[:, None, :, None])
    groups = query.shape[2] // keys.shape[0]
    wide = torch.promote_types(query.dtype, torch.float32)
    seen = [each[:, arena] for each in (keys, values)]
    scales, encoding = in_bytes
    if encoding is not None:
        seen = [dequantised(*each, wide, encoding) for each in zip(seen, scales[:, arena].unbind(-1))]
    keys, values = (
        each.transpose(0, 1).to(wide).masked_fill(unread[:, None, :, None], 0).repeat_interleave(groups, dim=1)
        for each in seen
    )
    scores = (query.to(wide).transpose(1, 2) @ keys.transpose(2, 3) * scale).masked_fill(unseen, -torch.inf)
    result = scores.softmax(-1).masked_fill(unseen.all(-1, keepdim=True), 0.0) @ values  # a NaN stays one
    return result.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def canvas_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    base: torch.Tensor,
    width: int,
    scale: float,
    runs: torch.Tensor | None = None,
    longest: int = 0,
    shared: torch.Tensor | None = None,
    own: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    encoding: str | None = None,
    cascade: Cascade | None = None,
) -> torch.Tensor:
    """Args:
        query: `(batch, window, heads, head_dim)`, the last dimension contiguous, as of `keys` and `values`.
        keys, values: `(kv_heads, columns, head_dim)`, an arena in which each row has a canvas; heads i * groups to
            (i + 1) * groups - 1 read key head i.
        lengths: `(batch, window)` int32: a query sees so many columns of its row's canvas. With none the result is 0.
        base: `(batch,)` int64: column i of a row's canvas is column base + i of the arena.
        width: of the longest canvas; no length is larger.
        scale: of the scores.
        runs: `(runs, 3)` int64, if the batch of one is a list of tokens of several rows, see [`window.Window`]: the second
            number is the index of a run's first token, the third how many tokens it has. `base` is `(runs,)` then. Each
            token must be in one run.
        longest: no run has more tokens.
        shared: `(2, batch)` int64, contiguous, where rows share the beginning of their canvases: column i of a row is column
            shared[0] + i of the arena for i < shared[1]. Of the shape of `base` otherwise, as with `runs`.
        own: `(3, batch)` int64, contiguous, where rows have some columns for themselves beside a canvas that they share with
            others: column i of a row is column own[2] + i - own[0] of the arena for own[0] <= i < own[1]. As `shared`.
        encoding: of keys and values, where these are in 8 bits (uint8), see [`eight_bits`].
        scales: `(kv_heads, columns, 2)` bfloat16, contiguous, of keys and of values, with an encoding.
        cascade: of a list, what its tokens read together: these columns are not read for each run.

    Returns:
        `(batch, window, heads, head_dim)`, contiguous.
    """
    batch, window, heads, head_dim = query.shape
    kv_heads, number = keys.shape[0], batch * window * heads
    groups = heads // kv_heads
    readings = _readings(lengths.contiguous(), base, runs, window if runs is None else longest, shared, own, cascade)
    tiles = [tile_of(most * groups, query.element_size() > 2, encoding is not None) for _, _, _, most, *_ in readings]
    few = number / (len(base) * kv_heads) <= FEW
    programs = triton.cdiv(readings[0][3] * groups, tiles[0][1]) * len(base) * kv_heads
    splits = [number_of_splits(programs, width, query.device, 3.6 if few else 0)]
    if cascade is not None:  # of its pieces some may be empty
        programs = triton.cdiv(window * groups, tiles[1][1]) * kv_heads
        splits.append(number_of_splits(programs, width, query.device))
    out = torch.empty(batch, window, heads, head_dim, dtype=query.dtype, device=query.device)
    parts, sums = out, lengths  # unused arguments of a single part
    if sum(splits) > 1:
        parts = torch.empty(sum(splits), batch, window, heads, head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(sum(splits), batch, window, heads, dtype=torch.float32, device=query.device)
    for reading, tile, number_of_parts, first in zip(readings, tiles, splits, (0, splits[0])):
        results = (out, parts[first:], sums[first:], sum(splits) > 1)
        _read(query, keys, values, (scales, encoding), scale, reading, tile, number_of_parts, results)
    if sum(splits) > 1:
        _combine[(number,)](
            out, parts, sums, number, sum(splits), BLOCK_S=triton.next_power_of_2(sum(splits)),
            HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), num_warps=2,
        )  # fmt: skip
    return out


def _read(query, keys, values, in_bytes, scale, reading: tuple, tile: tuple, splits: int, results: tuple) -> None:
    """Launch the programs of one of [`_readings`]. `in_bytes`: scales and encoding; `results`: where they go, and whether they
    are parts."""
    _, window, heads, head_dim = query.shape
    kv_heads, number, groups = len(keys), query.shape[:-1].numel(), heads // len(keys)
    lengths, base, runs, longest, shared, own, skipped = reading
    (axis, block_m, block_n, warps), (out, parts, sums, is_split) = tile, results
    block_d = max(16, triton.next_power_of_2(head_dim))
    pairs, (scales, encoding) = lengths, in_bytes  # unused without scales
    if encoding is not None:
        keys, values = keys.view(torch.float8_e4m3fn) if encoding == "fp8" else keys, values.view(torch.int16)
        pairs = scales.view(torch.int32)  # one load for both: no asynchronous one has less than four bytes
    row = block_d * query.element_size()  # of keys in 8 bits too, which may stand there as they are multiplied
    _attend[(triton.cdiv(longest * groups, block_m), len(base) * kv_heads, splits)](
        query, keys, values, lengths, base, base if runs is None else runs, base if shared is None else shared,
        base if own is None else own, base if skipped is None else skipped, pairs, out, parts, sums, scale * LOG2E,
        window, kv_heads, number, splits,
        *query.stride()[:3], *keys.stride()[:2], *values.stride()[:2], keys.shape[1],
        GROUPS=groups, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, AXIS=axis,
        IS_SPLIT=is_split, IS_LIST=runs is not None, IS_SHARED=shared is not None, HAS_OWN=own is not None,
        SKIPS=skipped is not None, ENCODING=encoding, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=number_of_stages(block_m, block_n, row, query.device),
    )  # fmt: skip


if triton is not None:
    IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without a GPU: it has no assembly

    @triton.jit
    def _fractions(tile, scale, is_short: tl.constexpr):
        """What queries are multiplied as with keys in 8 bits, and the scale of each row's scores. A GPU makes two float16 of two
        8-bit floats at once, and bfloat16 in three steps. What 8-bit numbers are multiplied with has room in float16: the
        queries as fractions of their largest number, and the weights of values times the scales of these, as fractions of the
        largest such product."""
        largest = tl.max(tl.abs(tile.to(tl.float32)), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        fractions = tile.to(tl.float32) / largest[:, None]
        if is_short:
            fractions = fractions.to(tl.float16)
        return fractions, (largest * scale).to(tl.float32)

    @triton.jit
    def _scaled(score, pair):
        """Scores of keys in 8 bits with the scales of the keys, and of values, as exponents; and the inverses of the latter."""
        exponent = pair & 0x7F800000  # of a power of two, where float32 has it
        score = score * (pair << 16).to(tl.float32, bitcast=True) + (exponent.to(tl.float32) / 8388608.0 - 127.0)
        return score, (0x7F000000 - exponent).to(tl.float32, bitcast=True)

    @triton.jit
    def _parts_of_row(shared, own, readers, begin, IS_SHARED: tl.constexpr, HAS_OWN: tl.constexpr):
        """Where what is not in a row's extent ends, begins and ends, and how far away it stands: see [`place_in_arena`]."""
        last_shared, away, first_own, last_own, aside = 0, 0, 0, 0, 0
        if IS_SHARED:
            last_shared, away = tl.load(shared + readers).to(tl.int32), (tl.load(shared) - begin).to(tl.int32)
        if HAS_OWN:
            first_own, last_own = tl.load(own).to(tl.int32), tl.load(own + readers).to(tl.int32)
            aside = (tl.load(own + 2 * readers) - begin).to(tl.int32) - first_own
        return last_shared, away, first_own, last_own, aside

    @triton.jit
    def _part(longest, skipped, splits, split, BLOCK_N: tl.constexpr, SKIPS: tl.constexpr):
        """Where a part of the keys begins and ends. The parts are of what is seen: a step does not get slower with the room that
        an extent has left."""
        begin = 0
        if SKIPS:
            begin = tl.load(skipped).to(tl.int32)
        chunk = tl.cdiv(tl.cdiv(tl.maximum(longest - begin, 0), splits), BLOCK_N) * BLOCK_N
        begin += split * chunk
        return begin, tl.minimum(longest, begin + chunk)

    @triton.jit
    def _place(column, parts_of_row, IS_SHARED: tl.constexpr, HAS_OWN: tl.constexpr):
        """The twin of [`place_in_arena`], counted from the row's base."""
        last_shared, away, first_own, last_own, aside = parts_of_row
        place = column
        if IS_SHARED:
            place += tl.where(column < last_shared, away, 0)
        if HAS_OWN:
            place = tl.where((column >= first_own) & (column < last_own), column + aside, place)
        return place

    @triton.jit
    def _product(of_queries, of_keys, AXIS: tl.constexpr, PRECISION: tl.constexpr):
        """`of_queries` has a row for each query where `AXIS` is 1, and a column where it is 0."""
        if AXIS == 1:
            return tl.dot(of_queries, of_keys, input_precision=PRECISION)
        else:
            return tl.dot(of_keys, of_queries, input_precision=PRECISION)

    @triton.jit
    def _weights(score, highest, AXIS: tl.constexpr):
        """Of the queries: the highest score so far, the weights of these keys, and what the sums so far are multiplied with."""
        higher = tl.maximum(highest, tl.max(score, AXIS))
        # A query may see none of these keys: -inf - -inf would be NaN.
        lowest = tl.where(higher == -float("inf"), 0.0, higher)
        return higher, tl.exp2(score - tl.expand_dims(lowest, AXIS)), tl.exp2(highest - lowest)

    @triton.jit
    def _floats(key, dtype: tl.constexpr, ENCODING: tl.constexpr):
        """Keys as a tile of `dtype`."""
        if ENCODING != "int8":
            return key.to(dtype)
        elif IS_INTERPRETED or dtype == tl.float32:
            return (key.to(tl.int16) - 128).to(dtype)
        else:
            # The byte b behind 0x64 is 1024 + b in float16: four numbers in four instructions.
            return tl.inline_asm_elementwise(
                "{.reg .b32 a, b, c; mov.b32 c, 0x64806480;"
                "prmt.b32 a, $2, 0x64, 0x4140; prmt.b32 b, $2, 0x64, 0x4342;"
                "sub.rn.f16x2 $0, a, c; sub.rn.f16x2 $1, b, c;}",
                "=r,=r,r", [key], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip

    @triton.jit
    def _two_floats(pair, dtype: tl.constexpr, ENCODING: tl.constexpr):
        """Two numbers in 8 bits, of which `pair` has the bits, as two tiles of `dtype`."""
        if IS_INTERPRETED or dtype == tl.float32:
            first, second = pair.to(tl.uint8), (pair >> 8).to(tl.uint8)
            if ENCODING == "fp8":
                first, second = first.to(tl.float8e4nv, bitcast=True), second.to(tl.float8e4nv, bitcast=True)
            first, second = _floats(first, dtype, ENCODING), _floats(second, dtype, ENCODING)
        elif ENCODING == "int8":
            first, second = tl.inline_asm_elementwise(
                "{.reg .b32 a, b, c; mov.b32 c, 0x64806480;"
                "prmt.b32 a, $2, 0x64, 0x4240; prmt.b32 b, $2, 0x64, 0x4341;"
                "sub.rn.f16x2 $0, a, c; sub.rn.f16x2 $1, b, c;}",
                "=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            # Of two pairs in one register. The compiler takes eight instructions to sort their bytes, this is one.
            first, second = tl.inline_asm_elementwise(
                "{.reg .b32 s; .reg .b16 a, b; prmt.b32 s, $2, 0, 0x3120; mov.b32 {a, b}, s;"
                "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;}",
                "=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        return first, second

    @triton.jit
    def _rows(result, second, AXIS: tl.constexpr, ENCODING: tl.constexpr):
        """A row for each query."""
        if AXIS == 0:
            result, second = tl.trans(result), tl.trans(second)
        if ENCODING is not None:
            result = tl.reshape(tl.join(result, second), (result.shape[0], 2 * result.shape[1]))
        return result

    @triton.jit
    def _store(
        target, sums, row, of_part, result, total, highest, exists,
        IS_SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """The result of a tile of rows, or that of a part of the keys and the logarithm of its weights' sum."""
        total = tl.where(total < 0, float("nan"), total)  # the inverse of a scale that is NaN is -inf
        sees, dims = total != 0, tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (dims < HEAD_DIM)
        result = tl.where(sees[:, None], result / tl.where(sees, total, 1.0)[:, None], 0.0)
        if IS_SPLIT:
            row += of_part
            logsum = tl.where(sees, highest + tl.log2(tl.where(sees, total, 1.0)), -float("inf"))
            tl.store(sums + row, logsum, mask=exists)
        tl.store(target + row[:, None] * HEAD_DIM + dims, result.to(target.dtype.element_ty), mask=inside)

    # Not specialised: a number of parts or of tokens that comes up for the first time must not compile it again, nor must where
    # the tensors of a window begin, which are uploaded as one.
    @triton.jit(
        do_not_specialize=[
            "lengths", "base", "runs", "shared", "own", "skipped", "window", "number", "splits", "pair_head",
        ]
    )  # fmt: skip
    def _attend(
        query, keys, values, lengths, base, runs, shared, own, skipped, pairs, out, parts, sums, scale,
        window, kv_heads, number, splits,
        query_batch, query_token, query_head, key_head, key_column: tl.constexpr, value_head, value_column: tl.constexpr,
        pair_head, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, AXIS: tl.constexpr, IS_SPLIT: tl.constexpr, IS_LIST: tl.constexpr,
        IS_SHARED: tl.constexpr, HAS_OWN: tl.constexpr, SKIPS: tl.constexpr, ENCODING: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One tile of rows, one key head, one part of the keys. Scores are in units of log2."""
        reader, kv_head, split = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads, tl.program_id(2)
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        if IS_LIST:
            first, tokens = tl.load(runs + 3 * reader + 1), tl.load(runs + 3 * reader + 2)
            start_of_row = first * query_token
            if tl.program_id(0) * BLOCK_M >= tokens * GROUPS:
                return
        else:
            first, tokens = reader.to(tl.int64) * window, window
            start_of_row = reader.to(tl.int64) * query_batch
        exists = rows < tokens * GROUPS
        token, head = rows // GROUPS, kv_head * GROUPS + rows % GROUPS
        dims = tl.arange(0, BLOCK_D)
        real = dims < HEAD_DIM
        length = tl.load(lengths + first + token, mask=exists, other=0)
        start_of_row += token * query_token + head * query_head
        tile = tl.load(query + start_of_row[:, None] + dims, mask=exists[:, None] & real, other=0.0)
        begin = tl.load(base + reader)
        # From here on places are counted from the row's base: 32 bits, which are faster, have room for their distance.
        keys += begin * key_column + kv_head.to(tl.int64) * key_head
        values += begin * value_column + kv_head.to(tl.int64) * value_head
        readers = tl.num_programs(1) // kv_heads
        parts_of_row = _parts_of_row(shared + reader, own + reader, readers, begin, IS_SHARED, HAS_OWN)
        if ENCODING is not None:
            pairs += begin + kv_head.to(tl.int64) * pair_head
            tile, scale = _fractions(tile, scale, query.dtype.element_ty != tl.float32)
            scale = tl.expand_dims(scale, AXIS)
        begin_of_part, end = _part(tl.max(length, 0), skipped + reader, splits, split, BLOCK_N, SKIPS)
        bound = tl.expand_dims(tl.minimum(length, end), AXIS)
        # Two numbers of a value in 8 bits are loaded as one: `result` is of the first ones, `second` of the others.
        SIZE: tl.constexpr = BLOCK_D if ENCODING is None else BLOCK_D // 2
        in_value = tl.expand_dims(tl.arange(0, SIZE), 1 - AXIS)
        is_real = in_value < (HEAD_DIM if ENCODING is None else HEAD_DIM // 2)
        if AXIS == 0:
            tile = tl.trans(tile)
        highest, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
        result = tl.zeros([BLOCK_M, SIZE] if AXIS == 1 else [SIZE, BLOCK_M], tl.float32)
        second = result
        for start in range(begin_of_part, end, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            # The last key is read again for those behind it, which no query sees: a mask would cost instructions for each load.
            seen = tl.minimum(column, end - 1)
            place = _place(seen, parts_of_row, IS_SHARED, HAS_OWN)
            key_place = tl.expand_dims(place, 1 - AXIS) * key_column
            key = tl.load(keys + key_place + tl.expand_dims(dims, AXIS), mask=tl.expand_dims(real, AXIS), other=0.0)
            if ENCODING is not None:
                pair = tl.load(pairs + place)
            # Inductor passes Python floats as fp64; cast back.
            score = (_product(tile, _floats(key, tile.dtype, ENCODING), AXIS, PRECISION) * scale).to(tl.float32)
            if ENCODING is not None:
                score, inverse = _scaled(score, tl.expand_dims(pair, 1 - AXIS))
            score = tl.where(tl.expand_dims(column, 1 - AXIS) < bound, score, -float("inf"))
            higher, prob, fade = _weights(score, highest, AXIS)
            value = tl.load(values + tl.expand_dims(place, AXIS) * value_column + in_value, mask=is_real, other=0)
            weight = prob.to(tile.dtype)
            if ENCODING is not None:
                prob *= inverse
                value, other = _two_floats(value, tile.dtype, ENCODING)
                second = second * tl.expand_dims(fade, AXIS) + _product(weight, other, AXIS, PRECISION)
            result = result * tl.expand_dims(fade, AXIS) + _product(weight, value, AXIS, PRECISION)
            total, highest = total * fade + tl.sum(prob, AXIS), higher

        result = _rows(result, second, AXIS, ENCODING)
        row = (first + token).to(tl.int64) * kv_heads * GROUPS + head
        part, target = split.to(tl.int64) * number, parts if IS_SPLIT else out
        _store(target, sums, row, part, result, total, highest, exists, IS_SPLIT, HEAD_DIM, BLOCK_D)

    @triton.jit(do_not_specialize=["number", "splits"])
    def _combine(
        out, parts, sums, number, splits,
        BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """The parts of one row, weighted by what they saw."""
        row = tl.program_id(0).to(tl.int64)
        split, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
        source = split.to(tl.int64) * number + row
        logsum = tl.load(sums + source, mask=split < splits, other=-float("inf"))
        saw = logsum != -float("inf")
        highest = tl.max(logsum, 0)
        weight = tl.where(saw, tl.exp2(logsum - tl.where(highest > -float("inf"), highest, 0.0)), 0.0)
        inside = saw[:, None] & (dims < HEAD_DIM)
        part = tl.load(parts + source[:, None] * HEAD_DIM + dims, mask=inside, other=0.0)
        total = tl.sum(weight, 0)
        result = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
        tl.store(out + row * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
