"""Triton kernels for whole texts, with gradients: both scans of every block, and the recurrence from block to block. Their
torch forms are in `gated_linear_attention.py`, which chooses. They are operators, which `torch.compile` calls as they are.
"""

import hashlib
from pathlib import Path

import torch
from transformers.utils import is_torch_greater_or_equal

from ..kernels.triton import has_kernels, tl, triton

# Sizes up to which a program has its tiles in registers: tokens of a block, width of a head's keys and of its values.
LARGEST = (64, 128, 128)
# What a program of the recurrence keeps of a state.
ELEMENTS = 1024

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


def takes_states(updates: torch.Tensor) -> bool:
    """Whether [`block_recurrence`] can compute them."""
    return _serve(updates) and updates.dtype == torch.float32 and updates.shape[-1] <= ELEMENTS


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
    arguments = {"tokens": tokens, "scale": key_dim**-0.5}
    return (triton.cdiv(tokens, used), heads, rows), {**arguments, **sizes, "num_warps": 4 if tile <= 32 else 8}


@block_scans.register_fake
def _(query, key, value, log_decay, rows):
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(2))


@_block_scans_backward.register_fake
def _(query, key, value, log_decay, rows, of_forward, of_backward):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, log_decay))


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.rows = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx, *gradients):
    return *_block_scans_backward(*ctx.saved_tensors, ctx.rows, *gradients), None


block_scans.register_autograd(_scan_gradients, setup_context=_keep_inputs)


@torch.library.custom_op(f"{NAMESPACE}::block_recurrence", mutates_args=())
def block_recurrence(
    updates: torch.Tensor, log_decays: torch.Tensor, initial_state: torch.Tensor, samples: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`block_states`] in float32; every state is written once, and read for nothing else."""
    updates, log_decays, initial_state = (x.contiguous() for x in (updates, log_decays, initial_state))
    before, last = torch.empty_like(updates), torch.empty_like(initial_state)
    if last.numel():
        grid, options = _parts(updates, samples)
        with torch.cuda.device_of(updates):
            _recur[grid](updates, log_decays, initial_state, _given(samples, log_decays), before, last, **options)
    return before, last


@torch.library.custom_op(f"{NAMESPACE}::block_recurrence_backward", mutates_args=())
def _block_recurrence_backward(
    before: torch.Tensor,
    log_decays: torch.Tensor,
    of_before: torch.Tensor,
    of_last: torch.Tensor,
    samples: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of updates, log-decays and the initial state."""
    before, log_decays, of_before, of_last = (x.contiguous() for x in (before, log_decays, of_before, of_last))
    found = [torch.empty_like(x) for x in (before, log_decays, of_last)]
    if of_last.numel():
        grid, options = _parts(before, samples)
        with torch.cuda.device_of(before):
            _recur_backward[grid](
                before, log_decays, of_before, of_last, _given(samples, log_decays), *found, **options
            )
    return found[0], found[1], found[2]


def _given(samples: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if samples is None else samples.contiguous()


def _parts(updates: torch.Tensor, samples: torch.Tensor | None):
    """The grid, and sizes: a program takes some rows of one head's state through all blocks."""
    batch, blocks, heads, key_dim, value_dim = updates.shape
    width = triton.next_power_of_2(value_dim)
    rows = max(ELEMENTS // width, 1)
    sizes = {"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "BLOCK_K": rows, "BLOCK_V": width}
    options = {"blocks": blocks, "HAS_SAMPLES": samples is not None, **sizes, "num_warps": 4}
    return (triton.cdiv(key_dim, rows), heads, batch), options


@block_recurrence.register_fake
def _(updates, log_decays, initial_state, samples):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (updates, initial_state))


@_block_recurrence_backward.register_fake
def _(before, log_decays, of_before, of_last, samples):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (before, log_decays, of_last))


def _keep(ctx, inputs, output) -> None:
    _, log_decays, _, samples = inputs
    ctx.save_for_backward(output[0], log_decays, samples)


def _recurrence_gradients(ctx, of_before, of_last):
    before, log_decays, samples = ctx.saved_tensors
    return *_block_recurrence_backward(before, log_decays, of_before, of_last, samples), None


block_recurrence.register_autograd(_recurrence_gradients, setup_context=_keep)


if triton is not None:

    @triton.jit
    def _tile(tokens, SIZE: tl.constexpr, USED: tl.constexpr, BLOCK_T: tl.constexpr):
        """Of each token of a program's tile the row of its head, and whether it exists; of each and each other whether they are of
        one block, and which of them is before and which after."""
        step = tl.arange(0, BLOCK_T)
        token = tl.program_id(0) * USED + step
        exists, token = (step < USED) & (token < tokens), tl.program_id(2).to(tl.int64) * tokens + token
        is_same = (step // SIZE)[:, None] == step // SIZE
        is_before, is_after = is_same & (step[:, None] >= step), is_same & (step[:, None] <= step)
        return token * tl.num_programs(1) + tl.program_id(1), exists, is_same, is_before, is_after

    @triton.jit
    def _decayed(query, key, log_decay, at, inside, scale, same, before):
        """Queries and keys of a tile, and the log-decays from a block's beginning up to each token, and from its end, both
        relative to the middle of what decays in the block: so that no exponential overflows."""
        q = tl.load(query + at, mask=inside, other=0.0).to(tl.float32) * scale
        k = tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(log_decay + at, mask=inside, other=0.0)
        left = tl.dot(before, decay, input_precision="ieee") - 0.5 * tl.dot(same, decay, input_precision="ieee")
        return q.to(tl.float32), k, left, decay - left

    @triton.jit
    def _scores(
        query, key, log_decay, row, exists, scale, same, before,
        KEY_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Of each token and each other of the tile, in both directions; those of other blocks mean nothing."""
        from_start = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        from_end = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for first in range(0, KEY_DIM, BLOCK_K):
            dim = first + tl.arange(0, BLOCK_K)
            at, inside = row[:, None] * KEY_DIM + dim, exists[:, None] & (dim < KEY_DIM)
            q, k, left, right = _decayed(query, key, log_decay, at, inside, scale, same, before)
            from_start += tl.dot(q * tl.exp(left), tl.trans(k * tl.exp(-left)), input_precision="ieee")
            from_end += tl.dot(q * tl.exp(right), tl.trans(k * tl.exp(-right)), input_precision="ieee")
        return from_start, from_end

    @triton.jit
    def _scan_blocks(
        query, key, value, log_decay, forward, backward, tokens, scale,
        SIZE: tl.constexpr, USED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        row, exists, is_same, is_before, is_after = _tile(tokens, SIZE, USED, BLOCK_T)
        same, before = is_same.to(tl.float32), is_before.to(tl.float32)
        from_start, from_end = _scores(
            query, key, log_decay, row, exists, scale, same, before, KEY_DIM, BLOCK_T, BLOCK_K
        )
        ends = tl.arange(0, BLOCK_V)
        own, is_value = row[:, None] * VALUE_DIM + ends, exists[:, None] & (ends < VALUE_DIM)
        v = tl.load(value + own, mask=is_value, other=0.0).to(tl.float32)
        result = tl.dot(tl.where(is_before, from_start, 0.0), v, input_precision="ieee")
        tl.store(forward + own, result.to(forward.dtype.element_ty), mask=is_value)
        result = tl.dot(tl.where(is_after, from_end, 0.0), v, input_precision="ieee")
        tl.store(backward + own, result.to(backward.dtype.element_ty), mask=is_value)

    @triton.jit
    def _scan_blocks_backward(
        query, key, value, log_decay, of_forward, of_backward, of_query, of_key, of_value, of_log_decay, tokens, scale,
        SIZE: tl.constexpr, USED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        row, exists, is_same, is_before, is_after = _tile(tokens, SIZE, USED, BLOCK_T)
        same, before, after = is_same.to(tl.float32), is_before.to(tl.float32), is_after.to(tl.float32)
        from_start, from_end = _scores(
            query, key, log_decay, row, exists, scale, same, before, KEY_DIM, BLOCK_T, BLOCK_K
        )
        ends = tl.arange(0, BLOCK_V)
        own, is_value = row[:, None] * VALUE_DIM + ends, exists[:, None] & (ends < VALUE_DIM)
        v = tl.load(value + own, mask=is_value, other=0.0).to(tl.float32)
        of_f = tl.load(of_forward + own, mask=is_value, other=0.0).to(tl.float32)
        of_b = tl.load(of_backward + own, mask=is_value, other=0.0).to(tl.float32)
        of_v = tl.dot(tl.trans(tl.where(is_before, from_start, 0.0)), of_f, input_precision="ieee")
        of_v += tl.dot(tl.trans(tl.where(is_after, from_end, 0.0)), of_b, input_precision="ieee")
        tl.store(of_value + own, of_v.to(of_value.dtype.element_ty), mask=is_value)
        from_start = tl.where(is_before, tl.dot(of_f, tl.trans(v), input_precision="ieee"), 0.0)
        from_end = tl.where(is_after, tl.dot(of_b, tl.trans(v), input_precision="ieee"), 0.0)
        for first in range(0, KEY_DIM, BLOCK_K):
            dim = first + tl.arange(0, BLOCK_K)
            at, inside = row[:, None] * KEY_DIM + dim, exists[:, None] & (dim < KEY_DIM)
            q, k, left, right = _decayed(query, key, log_decay, at, inside, scale, same, before)
            grow, fade = tl.exp(-left), tl.exp(left)
            of_q = tl.dot(from_start, k * grow, input_precision="ieee") * fade
            of_k = tl.dot(tl.trans(from_start), q * fade, input_precision="ieee") * grow
            # The gradient of a log-decay is that of all sums that it is part of.
            of_decay = tl.dot(after, q * of_q - k * of_k, input_precision="ieee")
            grow, fade = tl.exp(-right), tl.exp(right)
            of_q_too = tl.dot(from_end, k * grow, input_precision="ieee") * fade
            of_k_too = tl.dot(tl.trans(from_end), q * fade, input_precision="ieee") * grow
            of_decay += tl.dot(before, q * of_q_too - k * of_k_too, input_precision="ieee")
            of_q = (of_q + of_q_too) * scale
            tl.store(of_query + at, of_q.to(of_query.dtype.element_ty), mask=inside)
            tl.store(of_key + at, (of_k + of_k_too).to(of_key.dtype.element_ty), mask=inside)
            tl.store(of_log_decay + at, of_decay.to(of_log_decay.dtype.element_ty), mask=inside)

    @triton.jit
    def _recur(
        updates, log_decays, initial, samples, before, last, blocks, HAS_SAMPLES: tl.constexpr,
        KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        head, row, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
        dim, ends = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        is_key = dim < KEY_DIM
        inside, offset = is_key[:, None] & (ends < VALUE_DIM), dim[:, None] * VALUE_DIM + ends
        own = (row * heads + head) * KEY_DIM * VALUE_DIM + offset
        state = tl.load(initial + own, mask=inside, other=0.0)
        for block in range(blocks):
            index = (row * blocks + block) * heads + head
            at = index * KEY_DIM * VALUE_DIM + offset
            if HAS_SAMPLES:
                earlier = tl.load(samples + row * blocks + block - 1, mask=block > 0, other=0)
                state = tl.where(tl.load(samples + row * blocks + block) == earlier, state, 0.0)
            tl.store(before + at, state, mask=inside)
            kept = tl.exp(tl.load(log_decays + index * KEY_DIM + dim, mask=is_key, other=0.0))
            state = kept[:, None] * state + tl.load(updates + at, mask=inside, other=0.0)
        tl.store(last + own, state, mask=inside)

    @triton.jit
    def _recur_backward(
        before, log_decays, of_before, of_last, samples, of_updates, of_log_decays, of_initial, blocks,
        HAS_SAMPLES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        head, row, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
        dim, ends = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        is_key = dim < KEY_DIM
        inside, offset = is_key[:, None] & (ends < VALUE_DIM), dim[:, None] * VALUE_DIM + ends
        own = (row * heads + head) * KEY_DIM * VALUE_DIM + offset
        of_state = tl.load(of_last + own, mask=inside, other=0.0)
        for done in range(blocks):
            block = blocks - 1 - done
            index = (row * blocks + block) * heads + head
            at = index * KEY_DIM * VALUE_DIM + offset
            tl.store(of_updates + at, of_state, mask=inside)
            kept = tl.exp(tl.load(log_decays + index * KEY_DIM + dim, mask=is_key, other=0.0))
            state = tl.load(before + at, mask=inside, other=0.0)
            tl.store(of_log_decays + index * KEY_DIM + dim, kept * tl.sum(of_state * state, 1), mask=is_key)
            of_state = kept[:, None] * of_state + tl.load(of_before + at, mask=inside, other=0.0)
            if HAS_SAMPLES:
                earlier = tl.load(samples + row * blocks + block - 1, mask=block > 0, other=0)
                of_state = tl.where(tl.load(samples + row * blocks + block) == earlier, of_state, 0.0)
        tl.store(of_initial + own, of_state, mask=inside)
