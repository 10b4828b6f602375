"""Triton kernels of a denoising step of GLADream, each beside its torch twin. One kernel reads the state, runs both scans of
a block and norms their heads.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..kernels.layers import rotate_torch
from ..kernels.triton import tl, triton
from .gated_linear_attention import MIN_LOG_DECAY, chunk_gla, short_convolution

# The largest sizes that fit into a program on every GPU from Ampere on: tokens of a block, width of a head's keys and of its
# values, rank of the projection to the decays.
LARGEST = (64, 128, 128, 64)


def short_convolutions_torch(inputs, weights) -> tuple[torch.Tensor, ...]:
    """The twin of [`short_convolutions`]."""
    return tuple(map(short_convolution, inputs, weights))


def short_convolutions(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """[`short_convolution`] of queries, keys and values.

    Args:
        inputs: three, `(batch, block_size, channels)`, each of its own number of channels. The last dimension contiguous,
            tokens at equal distances.
        weights: of each, `(channels, 1, size)`, contiguous, of one size.

    Returns:
        The three, as parts of one tensor.
    """
    query, key, value = inputs
    (batch, size), sizes = query.shape[:2], [x.shape[2] for x in inputs]
    out = torch.empty(batch, size, sum(sizes), dtype=query.dtype, device=query.device)
    channels = 32
    _short_convolutions[(batch, triton.cdiv(max(sizes), channels), 3)](
        query, key, value, *weights, out, query.stride(1), key.stride(1), value.stride(1), *sizes,
        SIZE=size, TAPS=weights[0].shape[-1], BLOCK_T=triton.next_power_of_2(size), BLOCK_C=channels, num_warps=4,
    )  # fmt: skip
    return out.split(sizes, dim=-1)


def read_block_torch(
    query, key, value, low_rank, decay_weight, decay_bias, cos, sin, state, slots, norm_weight, eps,
    gate_logit_normalizer, is_global, moves_on,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The twin of [`read_block`]."""
    heads, key_dim, value_dim = state.shape[1:]
    state = state[slots]
    query, key = (rotate_torch(x.unflatten(-1, (-1, key_dim)), cos, sin) for x in (query, key))
    value = value.unflatten(-1, (-1, value_dim))
    logits = F.linear(low_rank, decay_weight, decay_bias).float().view(key.shape)
    log_decay = (F.logsigmoid(logits) / gate_logit_normalizer).clamp(min=MIN_LOG_DECAY)
    key, value, log_decay = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value, log_decay))
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    initial, read = state, 0.0
    if is_global:
        initial, read = None, ((query * key_dim**-0.5).transpose(1, 2) @ state).transpose(1, 2)
    scan = lambda initial, reverse: chunk_gla(query, key, value, log_decay, initial, reverse, moves_on)
    norm = lambda x: F.rms_norm(x, (value_dim,), norm_weight.to(x.dtype), eps).flatten(-2).to(low_rank.dtype)
    scans = torch.cat([norm(scan(initial, reverse)[0] + read) for reverse in (False, True)], dim=-1)
    if not moves_on:
        return (scans,)
    (forward, forward_state), (backward, backward_state) = (scan(None, reverse) for reverse in (False, True))
    last_states = torch.stack([forward_state, backward_state], dim=1)
    return scans, last_states, log_decay.sum(1), torch.cat([norm(forward[:, -1]), norm(backward[:, 0])], dim=-1)


def read_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_rank: torch.Tensor,
    decay_weight: torch.Tensor,
    decay_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_logit_normalizer: float,
    is_global: bool,
    moves_on: bool,
) -> tuple[torch.Tensor, ...]:
    """The scans of a block in both directions, see [`GLADreamAttention`], with rotary positions, decays and norm.

    Args:
        query: `(batch, block_size, heads * key_dim)`; `key`, `value`: the same of the kv heads. The last dimension
            contiguous, tokens at equal distances.
        low_rank: `(batch, block_size, rank)`, what `decay_weight`, `(kv_heads * key_dim, rank)`, and `decay_bias`
            turn into the logits of the decays.
        cos, sin: `(batch, block_size, key_dim)`, contiguous.
        state: `(all slots, heads, key_dim, value_dim)` float32, contiguous, before the block.
        slots: `(batch,)` int64, the index into `state` of each row.
        norm_weight, eps: of the norm over each head's values.
        is_global: whether every token reads the state undecayed, or the scans start from it.
        moves_on: whether [`move_states`] follows.

    Returns:
        `(batch, block_size, 2 * heads * value_dim)`, contiguous: the forward scan, then the backward scan. With `moves_on`
        three more, all contiguous, of the scans from a state of zeros: their last states, `(batch, 2, heads, key_dim,
        value_dim)` float32, the sums of the log-decays, `(batch, heads, key_dim)` float32, and their last outputs,
        `(batch, 2 * heads * value_dim)`.
    """
    batch, size = query.shape[:2]
    heads, key_dim, value_dim = state.shape[1:]
    rank = low_rank.shape[-1]
    out = torch.empty(batch, size, 2 * heads * value_dim, dtype=query.dtype, device=query.device)
    last_states = log_decays = last_outputs = out  # unused arguments without `moves_on`
    if moves_on:
        last_states, log_decays = state.new_empty(batch, 2, *state.shape[1:]), state.new_empty(batch, heads, key_dim)
        last_outputs = out.new_empty(batch, out.shape[2])
    power = lambda number: max(16, triton.next_power_of_2(number))
    # A `BLOCK_K` of 16 gave garbage for a block that moves on (float32, triton 3.6, an H100). More than 32 rows in tf32 would
    # be Hopper's wgmma, which gave wrong numbers (bfloat16, blocks of 33, triton 3.6).
    precision = "ieee" if query.dtype == torch.float32 or size > 32 else "tf32"
    _read_block[(heads, batch, 2)](
        query, key, value, low_rank, decay_weight, decay_bias, cos, sin, state, slots, norm_weight, out,
        last_states, log_decays, last_outputs, key_dim**-0.5, 1.0 / gate_logit_normalizer, MIN_LOG_DECAY, eps,
        query.stride(1), key.stride(1), value.stride(1), low_rank.stride(1),
        GROUPS=heads * key_dim // key.shape[2], SIZE=size, RANK=rank, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_T=power(size), BLOCK_R=power(rank), BLOCK_K=32, BLOCK_V=power(value_dim),
        IS_GLOBAL=is_global, MOVES_ON=moves_on, PRECISION=precision,
        num_warps=4 if size <= 32 else 8, num_stages=2 if size <= 32 else 1,
    )  # fmt: skip
    return (out, last_states, log_decays, last_outputs) if moves_on else (out,)


def move_states_torch(state, slots, last_states, log_decays, gate_logits, moves, keeps=False) -> torch.Tensor | None:
    """The twin of [`move_states`]."""
    rows, heads = len(slots), state.shape[1]
    by_row = lambda x: x.unflatten(0, (rows, -1))
    forward, backward = by_row(last_states).unbind(2)
    gate = by_row(gate_logits).sigmoid().unflatten(-1, (heads, 1, -1)).to(state.dtype)
    updates, decays = torch.lerp(backward, forward, gate), by_row(log_decays).exp()[..., None]
    current = after = state[slots]
    before = []
    for block in range(updates.shape[1]):
        before.append(current)
        current = decays[:, block] * current + updates[:, block]
        after = torch.where((moves == block + 1)[:, None, None, None], current, after)
    state.index_copy_(0, slots, after)
    return torch.stack(before, dim=1).flatten(0, 1) if keeps else None


def move_states(
    state: torch.Tensor,
    slots: torch.Tensor,
    last_states: torch.Tensor,
    log_decays: torch.Tensor,
    gate_logits: torch.Tensor,
    moves: torch.Tensor,
    keeps: bool = False,
) -> torch.Tensor | None:
    """Move the states on over blocks, in place: the unit between blocks, see [`GLADreamAttention`].

    Args:
        state: `(all slots, heads, key_dim, value_dim)` float32, contiguous.
        slots: `(rows,)` int64, the index into `state` of each row; no two are the same.
        last_states, log_decays: as [`read_block`] returns them for all blocks, those of the first row first.
        gate_logits: `(rows * blocks, heads * value_dim)`, contiguous.
        moves: `(rows,)` int32, over how many of its blocks the state of each row moves.
        keeps: whether to return the states before each block.

    Returns:
        With `keeps` `(rows * blocks, heads, key_dim, value_dim)` float32, contiguous.
    """
    (heads, key_dim, value_dim), rows = state.shape[1:], len(slots)
    before = torch.empty_like(last_states[:, 0], memory_format=torch.contiguous_format) if keeps else None
    _move_states[(triton.cdiv(key_dim, 16), heads, rows)](
        state, slots, last_states, log_decays, gate_logits, moves, state if before is None else before,
        len(log_decays) // rows, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_K=16, BLOCK_V=triton.next_power_of_2(value_dim), KEEPS=keeps, num_warps=4,
    )  # fmt: skip
    return before


def mix_scans_torch(scans: torch.Tensor, gate_logits: torch.Tensor, output_gate: torch.Tensor) -> torch.Tensor:
    """The twin of [`mix_scans`]."""
    forward, backward = scans.chunk(2, dim=-1)
    return torch.lerp(backward, forward, gate_logits.sigmoid()) * F.silu(output_gate)


def mix_scans(scans: torch.Tensor, gate_logits: torch.Tensor, output_gate: torch.Tensor) -> torch.Tensor:
    """`(g * forward + (1 - g) * backward) * silu(output_gate)` with `g = sigmoid(gate_logits)`.

    Args:
        scans: `(batch, block_size, 2 * size)`, contiguous: forward, then backward.
        gate_logits, output_gate: `(batch, block_size, size)`, the last dimension contiguous, tokens at equal distances.

    Returns:
        `(batch, block_size, size)`, contiguous.
    """
    out = torch.empty(gate_logits.shape, dtype=scans.dtype, device=scans.device)
    size, block = out.shape[-1], 1024
    _mix_scans[(out.numel() // size, triton.cdiv(size, block))](
        scans, gate_logits, output_gate, out, size, gate_logits.stride(1), output_gate.stride(1),
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _short_convolutions(
        query, key, value, query_taps, key_taps, value_taps, out,
        query_token, key_token, value_token, query_channels, key_channels, value_channels,
        SIZE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """A block of channels of queries, keys or values, for the tokens of one sequence."""
        batch, which = tl.program_id(0).to(tl.int64), tl.program_id(2)
        channels, first, token, x, taps = query_channels, 0, query_token, query, query_taps
        if which == 1:
            channels, first, token, x, taps = key_channels, query_channels, key_token, key, key_taps
        if which == 2:
            channels, first, token, x, taps = (
                value_channels, query_channels + key_channels, value_token, value, value_taps
            )  # fmt: skip
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        step, is_channel = tl.arange(0, BLOCK_T), channel < channels
        x += batch * SIZE * token
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for tap in tl.static_range(TAPS):
            other = step + tap - TAPS // 2
            inside = ((other >= 0) & (other < SIZE))[:, None] & is_channel
            weight = tl.load(taps + channel * TAPS + tap, mask=is_channel, other=0.0).to(tl.float32)
            total += tl.load(x + other[:, None] * token + channel, mask=inside, other=0.0).to(tl.float32) * weight
        # Rounded where the torch form rounds.
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total = total / (1.0 + tl.exp(-total))
        target = (
            out + (batch * SIZE + step)[:, None] * (query_channels + key_channels + value_channels) + first + channel
        )
        tl.store(target, total.to(out.dtype.element_ty), mask=(step < SIZE)[:, None] & is_channel)

    @triton.jit
    def _load_rotated(x, dim, partner, cosine, sine, inside):
        """A dimension and its partner, half a head away, turn together; rounded as the torch form rounds."""
        own = tl.load(x + dim, mask=inside, other=0.0)
        rotated = own.to(tl.float32) * cosine
        rotated += tl.load(x + partner, mask=inside, other=0.0).to(tl.float32) * sine
        return rotated.to(own.dtype).to(tl.float32)

    @triton.jit
    def _read_block(
        query, key, value, low_rank, decay_weight, decay_bias, cos, sin, state, slots, norm_weight, out,
        last_states, log_decays, last_outputs, scale, inverse_normalizer, min_log_decay, eps,
        query_token, key_token, value_token, low_rank_token,
        GROUPS: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
        IS_GLOBAL: tl.constexpr, MOVES_ON: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One head of one block, in one direction."""
        head, batch, from_end = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
        heads, kv_head = tl.num_programs(0), head // GROUPS
        slot = tl.load(slots + batch)
        step, ranks, ends = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
        exists, is_value = step < SIZE, ends < VALUE_DIM
        token = batch * SIZE + step
        low = tl.load(
            low_rank + token[:, None] * low_rank_token + ranks, mask=exists[:, None] & (ranks < RANK), other=0.0
        )
        dtype = low.dtype
        low = low.to(tl.float32)
        values = value + token[:, None] * value_token + kv_head * VALUE_DIM + ends
        scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        result = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for first in range(0, KEY_DIM, BLOCK_K):
            dim = first + tl.arange(0, BLOCK_K)
            is_key = dim < KEY_DIM
            inside = exists[:, None] & is_key
            partner = tl.where(dim < KEY_DIM // 2, dim + KEY_DIM // 2, dim - KEY_DIM // 2)
            sign = tl.where(dim < KEY_DIM // 2, -1.0, 1.0)
            angle = token[:, None] * KEY_DIM + dim
            cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
            sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32) * sign
            q = _load_rotated(query + token[:, None] * query_token + head * KEY_DIM, dim, partner, cosine, sine, inside)
            q = (q * scale).to(tl.float32)  # Inductor passes `scale` as fp64
            k = _load_rotated(key + token[:, None] * key_token + kv_head * KEY_DIM, dim, partner, cosine, sine, inside)

            row = kv_head * KEY_DIM + dim
            weight = tl.load(
                decay_weight + row[None] * RANK + ranks[:, None], mask=is_key & (ranks < RANK)[:, None], other=0.0
            )
            logits = tl.dot(low, weight.to(tl.float32), input_precision=PRECISION)
            logits += tl.load(decay_bias + row, mask=is_key, other=0.0).to(tl.float32)
            logits = logits.to(dtype).to(tl.float32)
            decay = (tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))) * inverse_normalizer
            decay = tl.where(inside, tl.maximum(decay, min_log_decay), 0.0).to(tl.float32)
            # The log-decay of a state from the block's beginning up to each token.
            left = tl.cumsum(decay, 0)
            if from_end:
                left = tl.sum(decay, 0) - left + decay
            middle = tl.sum(tl.where((step == SIZE // 2)[:, None], left, 0.0), 0)
            scores += tl.dot(q * tl.exp(left - middle), tl.trans(k * tl.exp(middle - left)), input_precision=PRECISION)
            if MOVES_ON:
                total = tl.sum(decay, 0)
                v = tl.load(values, mask=exists[:, None] & is_value, other=0.0).to(tl.float32)
                last = tl.dot(tl.trans(k * tl.exp(total - left)), v, input_precision=PRECISION)
                target = (((batch * 2 + from_end) * heads + head) * KEY_DIM + dim[:, None]) * VALUE_DIM + ends
                tl.store(last_states + target, last, mask=is_key[:, None] & is_value)
                tl.store(log_decays + (batch * heads + head) * KEY_DIM + dim, total, mask=is_key)
            source = ((slot * heads + head) * KEY_DIM + dim[:, None]) * VALUE_DIM + ends
            before = tl.load(state + source, mask=is_key[:, None] & is_value, other=0.0)
            if not IS_GLOBAL:
                q = q * tl.exp(left)
            result += tl.dot(q, before, input_precision=PRECISION)

        order = step[:, None] - step
        sees = tl.where(from_end, order <= 0, order >= 0) & exists
        scores = tl.where(sees, scores, 0.0)
        v = tl.load(values, mask=exists[:, None] & is_value, other=0.0).to(tl.float32)
        inner = tl.dot(scores, v, input_precision=PRECISION)
        weight = tl.load(norm_weight + ends, mask=is_value, other=0.0).to(tl.float32)
        if MOVES_ON:
            row = tl.sum(tl.where((step == tl.where(from_end, 0, SIZE - 1))[:, None], inner, 0.0), 0)
            row = row * tl.rsqrt((tl.sum(row * row, 0) / VALUE_DIM + eps).to(tl.float32)) * weight
            target = last_outputs + ((batch * 2 + from_end) * heads + head) * VALUE_DIM + ends
            tl.store(target, row.to(dtype), mask=is_value)
        result += inner
        scaled = result * tl.rsqrt((tl.sum(result * result, 1) / VALUE_DIM + eps).to(tl.float32))[:, None] * weight
        target = out + (token[:, None] * 2 + from_end) * heads * VALUE_DIM + head * VALUE_DIM + ends
        tl.store(target, scaled.to(dtype), mask=exists[:, None] & is_value)

    @triton.jit
    def _move_states(
        state, slots, last_states, log_decays, gate_logits, moves, before, blocks,
        KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
        KEEPS: tl.constexpr,
    ):  # fmt: skip
        head, row, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
        dim, ends = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        is_key, is_value, number = dim < KEY_DIM, ends < VALUE_DIM, tl.load(moves + row)
        inside = is_key[:, None] & is_value
        if not KEEPS:
            # Rows that do not move load and store nothing.
            inside = is_key[:, None] & (ends < tl.where(number != 0, VALUE_DIM, 0))
        offset = dim[:, None] * VALUE_DIM + ends
        target = state + (tl.load(slots + row) * heads + head) * KEY_DIM * VALUE_DIM + offset
        current = tl.load(target, mask=inside, other=0.0)
        after = current
        for block in range(blocks):
            of_batch = (row * blocks + block) * heads
            of_head = of_batch + head
            if KEEPS:
                tl.store(before + of_head * KEY_DIM * VALUE_DIM + offset, current, mask=inside)
            logits = tl.load(gate_logits + of_head * VALUE_DIM + ends, mask=is_value, other=0.0).to(tl.float32)
            kept = tl.exp(tl.load(log_decays + of_head * KEY_DIM + dim, mask=is_key, other=0.0))
            of_last = last_states + (of_batch + of_head) * KEY_DIM * VALUE_DIM + offset
            forward = tl.load(of_last, mask=inside, other=0.0)
            backward = tl.load(of_last + heads * KEY_DIM * VALUE_DIM, mask=inside, other=0.0)
            current = kept[:, None] * current + backward + (forward - backward) / (1.0 + tl.exp(-logits))
            after = tl.where(block + 1 == number, current, after)
        tl.store(target, after, mask=inside)

    @triton.jit
    def _mix_scans(scans, gate_logits, output_gate, out, size, logits_token, gate_token, BLOCK: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        forward = tl.load(scans + token * 2 * size + index, mask=inside, other=0.0)
        dtype = forward.dtype
        forward = forward.to(tl.float32)
        backward = tl.load(scans + token * 2 * size + size + index, mask=inside, other=0.0).to(tl.float32)
        logits = tl.load(gate_logits + token * logits_token + index, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(output_gate + token * gate_token + index, mask=inside, other=0.0).to(tl.float32)
        mixed = backward + (forward - backward) / (1.0 + tl.exp(-logits))
        mixed = mixed.to(dtype).to(tl.float32) * (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(out + token * size + index, mixed.to(dtype), mask=inside)
