"""Triton kernels for whole texts, with gradients: both scans of every block, and what is read of the states before them.
Their torch forms are in `gated_linear_attention.py`, which chooses. They are operators, which `torch.compile` calls as they are.
"""

import hashlib
from pathlib import Path

import torch
from transformers.utils import is_torch_greater_or_equal

from ..kernels.triton import has_kernels, tl, triton

# Sizes up to which a program has its tiles in registers: tokens of a block, width of a head's keys and of its values.
LARGEST = (64, 128, 128)

# Before, `torch.compiler.is_exporting()` is True in whatever Dynamo compiles.
COMPILATION_KNOWS_EXPORTS = is_torch_greater_or_equal("2.13")

# Operators are found by their names, and one that is registered again replaces the first: code that comes with a checkpoint
# has its own.
NAMESPACE = "dllm_hf"
if not __name__.startswith("dllm_hf."):
    NAMESPACE += "_" + hashlib.sha256(__name__.encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def takes_scans(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether [`block_scans`] can compute them."""
    sizes = (query.shape[1], query.shape[-1], value.shape[-1])
    return _serve(query) and value.dtype != torch.float64 and all(a <= b for a, b in zip(sizes, LARGEST))


def takes_reads(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether [`block_reads`] can compute them."""
    sizes = (keys.shape[-2] // 2, keys.shape[-1], values.shape[-1])
    # Of larger blocks what a program reads ahead is more than a GPU's shared memory.
    return _serve(keys) and keys.dtype == torch.float32 and all(a <= b for a, b in zip(sizes, (16, *LARGEST[1:])))


def _serve(x: torch.Tensor) -> bool:
    # An exported program is to run where only PyTorch is.
    is_answered = COMPILATION_KNOWS_EXPORTS or not torch.compiler.is_dynamo_compiling()
    return has_kernels(x) and not (is_answered and torch.compiler.is_exporting())


@torch.library.custom_op(f"{NAMESPACE}::block_scans", mutates_args=())
def block_scans(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated linear attention from zero inside each block, from the first token to the last and from the last to the first.

    Args:
        query, key, log_decay: `(blocks, block_size, heads, key_dim)`; decays in float32, within `MIN_LOG_DECAY` and 0.
        value: `(blocks, block_size, heads, value_dim)`.
        rows: number of texts that the blocks belong to, as many to each: nothing of one reaches another, a NaN neither.

    Returns:
        Two of the shape and type of `value`.
    """
    inputs = [x.contiguous() for x in (query, key, value, log_decay)]
    outputs = torch.empty_like(inputs[2]), torch.empty_like(inputs[2])
    if value.numel():
        grid, options = _tiles(query, value, rows)
        with torch.cuda.device_of(value):
            _scan_blocks[grid](*inputs, *outputs, **options)
    return outputs


@torch.library.custom_op(f"{NAMESPACE}::block_scans_backward", mutates_args=())
def _block_scans_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rows: int,
    of_forward: torch.Tensor,
    of_backward: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the four inputs from those of the two outputs."""
    inputs = [x.contiguous() for x in (query, key, value, log_decay, of_forward, of_backward)]
    found = [torch.empty_like(x) for x in inputs[:4]]
    if value.numel():
        grid, options = _tiles(query, value, rows)
        with torch.cuda.device_of(value):
            _scan_blocks_backward[grid](*inputs, *found, **options)
    return found[0], found[1], found[2], found[3]


def _tiles(query: torch.Tensor, value: torch.Tensor, rows: int):
    """The grid, and sizes: a program takes one head of as many whole blocks of a text as fit."""
    number, size, heads, key_dim = query.shape
    tile, tokens = max(16, triton.next_power_of_2(size)), number // rows * size
    used = tile // size * size
    sizes = {"SIZE": size, "USED": used, "KEY_DIM": key_dim, "VALUE_DIM": value.shape[-1], "BLOCK_T": tile}
    sizes |= {"BLOCK_K": 32, "BLOCK_V": max(16, triton.next_power_of_2(value.shape[-1]))}
    # As in `read_block`: more rows in tf32 would be Hopper's wgmma, which gave wrong numbers.
    precision = "ieee" if value.dtype == torch.float32 or size > 32 else "tf32"
    # By the compiler's instructions and registers: on tensor cores one warp holds 16 tokens of a head of 64.
    warps = 8 if tile > 32 else 1 if (tile, precision) == (16, "tf32") else 4
    sizes |= {"PRECISION": precision}
    arguments = {"tokens": tokens, "scale": key_dim**-0.5}
    return (triton.cdiv(tokens, used), heads, rows), {**arguments, **sizes, "num_warps": warps}


@block_scans.register_fake
def _(query, key, value, log_decay, rows):
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(2))


@_block_scans_backward.register_fake
def _(query, key, value, log_decay, rows, of_forward, of_backward):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, log_decay))


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.option = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx, *gradients):
    return *_block_scans_backward(*ctx.saved_tensors, ctx.option, *gradients), None


block_scans.register_autograd(_scan_gradients, setup_context=_keep_inputs)


def _given(samples: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if samples is None else samples.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::block_reads", mutates_args=())
def block_reads(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decays: torch.Tensor,
    samples: torch.Tensor | None,
    is_exact: bool,
) -> torch.Tensor:
    """`queries @ S`, where `S` is the state before each block, from zeros: [`block_states`] of `keys.mT @ values`. No state is
    ever in memory, for the gradients those of one layer at a time.

    Args:
        queries: `(rows, blocks, heads, reads, key_dim)`; `keys`, `values`: the same of what a block adds; all in float32.
        log_decays, samples: as of [`block_states`].
        is_exact: in float32; else in tf32.
    """
    queries, keys, values, log_decays = (x.contiguous() for x in (queries, keys, values, log_decays))
    out = queries.new_empty(*queries.shape[:-1], values.shape[-1])
    _launch_reads(queries, keys, values, log_decays, samples, out, is_exact, stores=False)
    return out


def _launch_reads(queries, keys, values, log_decays, samples, out, is_exact: bool, stores: bool) -> None:
    """Into `out` what is read, or with `stores` the states before the blocks."""
    if not out.numel():
        return
    rows, blocks, heads, adds, key_dim = keys.shape
    value_dim, tile = values.shape[-1], 32
    with torch.cuda.device_of(keys):
        _read_states[(triton.cdiv(value_dim, tile), heads, rows)](
            queries, keys, values, log_decays, _given(samples, log_decays), out, blocks, STORES=stores,
            **_sizes(queries.shape[3], adds, key_dim, value_dim, samples is not None, is_exact),
            BLOCK_K=max(16, triton.next_power_of_2(key_dim)), BLOCK_V=tile, num_warps=2, num_stages=2,
        )  # fmt: skip


def _sizes(reads: int, adds: int, key_dim: int, value_dim: int, has_samples: bool, is_exact: bool) -> dict:
    # Two warps are no group that Hopper's wgmma would take.
    sizes = {"READS": reads, "ADDS": adds, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "HAS_SAMPLES": has_samples}
    powers = {
        "BLOCK_R": min(32, max(16, triton.next_power_of_2(reads))),
        "BLOCK_M": max(16, triton.next_power_of_2(adds)),
    }
    return {**sizes, **powers, "PRECISION": "ieee" if is_exact else "tf32"}


@torch.library.custom_op(f"{NAMESPACE}::block_reads_backward", mutates_args=())
def _block_reads_backward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decays: torch.Tensor,
    samples: torch.Tensor | None,
    is_exact: bool,
    of_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the first four from that of the output."""
    queries, keys, values, log_decays, of_out = (x.contiguous() for x in (queries, keys, values, log_decays, of_out))
    rows, blocks, heads, adds, key_dim = keys.shape
    value_dim, tile = values.shape[-1], 32
    tiles = -(-key_dim // tile)
    states = keys.new_empty(rows, blocks, heads, key_dim, value_dim)
    found = [torch.empty_like(x) for x in (queries, keys, log_decays)]
    of_values = values.new_empty(tiles, *values.shape)  # a part for each tile of the keys
    if states.numel():
        _launch_reads(queries, keys, values, log_decays, samples, states, is_exact, stores=True)
        with torch.cuda.device_of(keys):
            _read_states_backward[(tiles, heads, rows)](
                queries, keys, values, log_decays, _given(samples, log_decays), states, of_out, *found, of_values, blocks,
                values.numel(), **_sizes(queries.shape[3], adds, key_dim, value_dim, samples is not None, is_exact),
                BLOCK_K=tile, BLOCK_V=max(16, triton.next_power_of_2(value_dim)), num_warps=2, num_stages=2,
            )  # fmt: skip
    return found[0], found[1], of_values.sum(0), found[2]


@block_reads.register_fake
def _(queries, keys, values, log_decays, samples, is_exact):
    return queries.new_empty(*queries.shape[:-1], values.shape[-1])


@_block_reads_backward.register_fake
def _(queries, keys, values, log_decays, samples, is_exact, of_out):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (queries, keys, values, log_decays)
    )


def _read_gradients(ctx, of_out):
    return *_block_reads_backward(*ctx.saved_tensors, ctx.option, of_out), None, None


block_reads.register_autograd(_read_gradients, setup_context=_keep_inputs)


if triton is not None:

    @triton.jit
    def _tile(tokens, SIZE: tl.constexpr, USED: tl.constexpr, BLOCK_T: tl.constexpr):
        """Of each token of a program's tile the row of its head, and whether it exists; of each and each other of its block which is
        before and which after."""
        step = tl.arange(0, BLOCK_T)
        token = tl.program_id(0) * USED + step
        exists, token = (step < USED) & (token < tokens), tl.program_id(2).to(tl.int64) * tokens + token
        is_same = (step // SIZE)[:, None] == step // SIZE
        is_before, is_after = is_same & (step[:, None] >= step), is_same & (step[:, None] <= step)
        return token * tl.num_programs(1) + tl.program_id(1), exists, is_before, is_after

    @triton.jit
    def _read_states(
        queries, keys, values, log_decays, samples, out, blocks, STORES: tl.constexpr,
        READS: tl.constexpr, ADDS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        HAS_SAMPLES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """Some columns of one head's state through all blocks."""
        head, row, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
        dim, ends = tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        adds, is_key, is_value = tl.arange(0, BLOCK_M), dim < KEY_DIM, ends < VALUE_DIM
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        for block in range(blocks):
            index = (row * blocks + block) * heads + head
            if HAS_SAMPLES:
                earlier = tl.load(samples + row * blocks + block - 1, mask=block > 0, other=0)
                state = tl.where(tl.load(samples + row * blocks + block) == earlier, state, 0.0)
            if STORES:
                at = (index * KEY_DIM + dim[:, None]) * VALUE_DIM + ends
                tl.store(out + at, state, mask=is_key[:, None] & is_value)
            else:
                for first in tl.static_range(0, READS, BLOCK_R):
                    read = first + tl.arange(0, BLOCK_R)
                    at, inside = index * READS + read, read < READS
                    q = tl.load(queries + at[:, None] * KEY_DIM + dim, mask=inside[:, None] & is_key, other=0.0)
                    found = tl.dot(q, state, input_precision=PRECISION)
                    tl.store(out + at[:, None] * VALUE_DIM + ends, found, mask=inside[:, None] & is_value)
            at, inside = index * ADDS + adds, (adds < ADDS)[:, None]
            k = tl.load(keys + at[:, None] * KEY_DIM + dim, mask=inside & is_key, other=0.0)
            v = tl.load(values + at[:, None] * VALUE_DIM + ends, mask=inside & is_value, other=0.0)
            kept = tl.exp(tl.load(log_decays + index * KEY_DIM + dim, mask=is_key, other=0.0))
            state = kept[:, None] * state + tl.dot(tl.trans(k), v, input_precision=PRECISION)

    @triton.jit
    def _read_states_backward(
        queries, keys, values, log_decays, samples, states, of_out, of_queries, of_keys, of_log_decays, of_values, blocks,
        part, READS: tl.constexpr, ADDS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        HAS_SAMPLES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """Some rows of the gradient of one head's state, from the last block to the first."""
        head, row, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
        dim, ends = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        adds, is_key, is_value = tl.arange(0, BLOCK_M), dim < KEY_DIM, ends < VALUE_DIM
        of_values += tl.program_id(0).to(tl.int64) * part
        of_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        for done in range(blocks):
            block = blocks - 1 - done
            index = (row * blocks + block) * heads + head
            at = (index * KEY_DIM + dim[:, None]) * VALUE_DIM + ends
            state = tl.load(states + at, mask=is_key[:, None] & is_value, other=0.0)
            at, inside = index * ADDS + adds, (adds < ADDS)[:, None]
            k = tl.load(keys + at[:, None] * KEY_DIM + dim, mask=inside & is_key, other=0.0)
            v = tl.load(values + at[:, None] * VALUE_DIM + ends, mask=inside & is_value, other=0.0)
            of_k = tl.dot(v, tl.trans(of_state), input_precision=PRECISION)
            tl.store(of_keys + at[:, None] * KEY_DIM + dim, of_k, mask=inside & is_key)
            of_v = tl.dot(k, of_state, input_precision=PRECISION)
            tl.store(of_values + at[:, None] * VALUE_DIM + ends, of_v, mask=inside & is_value)
            kept = tl.exp(tl.load(log_decays + index * KEY_DIM + dim, mask=is_key, other=0.0))
            tl.store(of_log_decays + index * KEY_DIM + dim, kept * tl.sum(of_state * state, 1), mask=is_key)
            of_state = kept[:, None] * of_state
            for first in tl.static_range(0, READS, BLOCK_R):
                read = first + tl.arange(0, BLOCK_R)
                at, inside = index * READS + read, (read < READS)[:, None]
                of_o = tl.load(of_out + at[:, None] * VALUE_DIM + ends, mask=inside & is_value, other=0.0)
                q = tl.load(queries + at[:, None] * KEY_DIM + dim, mask=inside & is_key, other=0.0)
                of_q = tl.dot(of_o, tl.trans(state), input_precision=PRECISION)
                tl.store(of_queries + at[:, None] * KEY_DIM + dim, of_q, mask=inside & is_key)
                of_state += tl.dot(tl.trans(q), of_o, input_precision=PRECISION)
            if HAS_SAMPLES:
                earlier = tl.load(samples + row * blocks + block - 1, mask=block > 0, other=0)
                of_state = tl.where(tl.load(samples + row * blocks + block) == earlier, of_state, 0.0)

    @triton.jit
    def _decayed(query, key, log_decay, at, inside, scale):
        """Queries and keys of a tile, and the log-decays from its beginning up to each token, and from its end. Differences
        within a block are all that counts: relative to the middle no exponential overflows."""
        q = tl.load(query + at, mask=inside, other=0.0).to(tl.float32) * scale
        k = tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(log_decay + at, mask=inside, other=0.0)
        left = tl.cumsum(decay, 0) - 0.5 * tl.sum(decay, 0)
        return q.to(tl.float32), k, left, decay - left

    @triton.jit
    def _scores(
        query, key, log_decay, row, exists, scale,
        KEY_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Of each token and each other of the tile, in both directions; those of other blocks mean nothing."""
        from_start = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        from_end = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for first in range(0, KEY_DIM, BLOCK_K):
            dim = first + tl.arange(0, BLOCK_K)
            at, inside = row[:, None] * KEY_DIM + dim, exists[:, None] & (dim < KEY_DIM)
            q, k, left, right = _decayed(query, key, log_decay, at, inside, scale)
            from_start += tl.dot(q * tl.exp(left), tl.trans(k * tl.exp(-left)), input_precision=PRECISION)
            from_end += tl.dot(q * tl.exp(right), tl.trans(k * tl.exp(-right)), input_precision=PRECISION)
        return from_start, from_end

    @triton.jit
    def _scan_blocks(
        query, key, value, log_decay, forward, backward, tokens, scale,
        SIZE: tl.constexpr, USED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        row, exists, is_before, is_after = _tile(tokens, SIZE, USED, BLOCK_T)
        from_start, from_end = _scores(query, key, log_decay, row, exists, scale, KEY_DIM, BLOCK_T, BLOCK_K, PRECISION)
        ends = tl.arange(0, BLOCK_V)
        own, is_value = row[:, None] * VALUE_DIM + ends, exists[:, None] & (ends < VALUE_DIM)
        v = tl.load(value + own, mask=is_value, other=0.0).to(tl.float32)
        result = tl.dot(tl.where(is_before, from_start, 0.0), v, input_precision=PRECISION)
        tl.store(forward + own, result.to(forward.dtype.element_ty), mask=is_value)
        result = tl.dot(tl.where(is_after, from_end, 0.0), v, input_precision=PRECISION)
        tl.store(backward + own, result.to(backward.dtype.element_ty), mask=is_value)

    @triton.jit
    def _multiplied(x, PRECISION: tl.constexpr):
        """`x` as a product takes it: its digits in tf32."""
        if PRECISION == "tf32":
            x = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return x

    @triton.jit
    def _products(of_scores, q, k, left, PRECISION: tl.constexpr):
        """The gradients of queries, keys and sums of log-decays. The last are of a block 0 in sum, in tf32 too, since both
        products have the same digits of what they multiply."""
        grow, fade = tl.exp(-left), tl.exp(left)
        faded, grown = _multiplied(q * fade, PRECISION), _multiplied(k * grow, PRECISION)
        of_faded = tl.dot(of_scores, grown, input_precision=PRECISION)
        of_grown = tl.dot(tl.trans(of_scores), faded, input_precision=PRECISION)
        return of_faded * fade, of_grown * grow, faded * of_faded - grown * of_grown

    @triton.jit
    def _scan_blocks_backward(
        query, key, value, log_decay, of_forward, of_backward, of_query, of_key, of_value, of_log_decay, tokens, scale,
        SIZE: tl.constexpr, USED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        row, exists, is_before, is_after = _tile(tokens, SIZE, USED, BLOCK_T)
        from_start, from_end = _scores(query, key, log_decay, row, exists, scale, KEY_DIM, BLOCK_T, BLOCK_K, PRECISION)
        ends = tl.arange(0, BLOCK_V)
        own, is_value = row[:, None] * VALUE_DIM + ends, exists[:, None] & (ends < VALUE_DIM)
        v = tl.load(value + own, mask=is_value, other=0.0).to(tl.float32)
        of_f = tl.load(of_forward + own, mask=is_value, other=0.0).to(tl.float32)
        of_b = tl.load(of_backward + own, mask=is_value, other=0.0).to(tl.float32)
        of_v = tl.dot(tl.trans(tl.where(is_before, from_start, 0.0)), of_f, input_precision=PRECISION)
        of_v += tl.dot(tl.trans(tl.where(is_after, from_end, 0.0)), of_b, input_precision=PRECISION)
        tl.store(of_value + own, of_v.to(of_value.dtype.element_ty), mask=is_value)
        from_start = tl.where(is_before, tl.dot(of_f, tl.trans(v), input_precision=PRECISION), 0.0)
        from_end = tl.where(is_after, tl.dot(of_b, tl.trans(v), input_precision=PRECISION), 0.0)
        for first in range(0, KEY_DIM, BLOCK_K):
            dim = first + tl.arange(0, BLOCK_K)
            at, inside = row[:, None] * KEY_DIM + dim, exists[:, None] & (dim < KEY_DIM)
            q, k, left, right = _decayed(query, key, log_decay, at, inside, scale)
            of_q, of_k, of_left = _products(from_start, q, k, left, PRECISION)
            of_q_too, of_k_too, of_right = _products(from_end, q, k, right, PRECISION)
            # A log-decay is part of the sums of all tokens behind it; what those of a whole block get is 0 in sum.
            of_decay = tl.cumsum(of_left, 0, reverse=True) + tl.cumsum(of_right, 0)
            of_q = (of_q + of_q_too) * scale
            tl.store(of_query + at, of_q.to(of_query.dtype.element_ty), mask=inside)
            tl.store(of_key + at, (of_k + of_k_too).to(of_key.dtype.element_ty), mask=inside)
            tl.store(of_log_decay + at, of_decay.to(of_log_decay.dtype.element_ty), mask=inside)
