"""Gated linear attention (Yang et al., arXiv:2312.06635): the recurrence, its chunked form, and `fla`'s kernels.

The recurrence is, for each head, `H_t = diag(exp(a_t)) H_{t-1} + k_t v_t^T` and `o_t = scale * q_t H_t` with
`scale = key_dim ** -0.5`, from the first token to the last or, with `reverse`, from the last to the first.

All functions take `query`, `key`, `log_decay`: `(batch, length, heads, key_dim)`, `value`: `(batch, length, heads,
value_dim)`, the layout of `fla`, and return the output, `(batch, length, heads, value_dim)`, and the state after the
last token of the scan, `(batch, heads, key_dim, value_dim)` in float32, or None without `output_final_state`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from .scan_kernels import block_scans as scans_of_kernels
from .scan_kernels import takes_scans

# Tokens of a chunk, and the lowest log-decay of a step. Relative to the middle of a chunk decays reach
# exp(CHUNK / 2 * -MIN_LOG_DECAY) = 2e8, and their products 5e16: float32 does not overflow.
CHUNK = 32
MIN_LOG_DECAY = -1.2

# Up to this number of scans (sequences times heads) `fla`'s recurrence is faster than its chunked form, measured on an
# H200 with `benchmarks/gla_kernels.py` when a layer asked for the states after the scans as well.
MAX_RECURRENT_SCANS = 512

# Up to this number of tokens a block's scans run on our kernel. With blocks of 8 a step of training takes 0.81 of its time
# with the torch form, compiled (two runs on an H200); beside `fla`'s chunked form, for larger blocks, it was not measured.
MOST_TOKENS = 16

# What CUDA takes along the last two dimensions of a grid.
LARGEST_GRID = 65535

# Our own two, and the kernels of flash-linear-attention under the names of its layer.
TORCH_MODES = ("torch", "naive")
FLA_MODES = ("chunk", "fused_recurrent")
MODES = ("auto", *TORCH_MODES, *FLA_MODES)


def gated_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    reverse: bool = False,
    output_final_state: bool = True,
    mode: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention.

    Args:
        log_decay: at most 0, and at least `MIN_LOG_DECAY` unless the mode is `naive`.
        initial_state: `(batch, heads, key_dim, value_dim)`; zeros if not given.
        mode: `torch` ([`chunk_gla`]), `naive` ([`recurrent_gla`]), `chunk` or `fused_recurrent` (`fla`'s kernels, on a
            GPU), or `auto`, see [`implementation`].
    """
    return implementation(mode, query)(query, key, value, log_decay, initial_state, reverse, output_final_state)


def block_scans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    mode: str = "auto",
    rows: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of both directions from zero, for all blocks of `rows` texts, those of the first text first. `auto` has a
    kernel for short blocks on a GPU."""
    if mode == "auto" and query.shape[1] <= MOST_TOKENS and takes_scans(query, value):
        return scans_of_kernels(query, key, value, log_decay, rows)
    inputs = query, key, value, log_decay
    forward, _ = gated_linear_attention(*inputs, output_final_state=False, mode=mode)
    backward, _ = gated_linear_attention(*inputs, reverse=True, output_final_state=False, mode=mode)
    return forward, backward


def implementation(mode: str, query: torch.Tensor) -> Callable:
    """The function that runs a mode for inputs such as `query`."""
    if mode == "auto":
        mode = "torch"
        # `fla`'s kernels in bfloat16 alone: its chunked form computes float32 in tf32. `torch.compile` cannot fuse them.
        if query.is_cuda and query.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and fla_kernels():
            if query.shape[0] * query.shape[2] <= MAX_RECURRENT_SCANS:
                mode = "fused_recurrent"
            elif torch.is_grad_enabled():
                # In training alone, where all batches are of one size: for each size it is compiled and tuned anew, which
                # takes seconds, and prompts are of any.
                mode = "chunk"
    if mode == "torch":
        return chunk_gla
    if mode == "naive":
        return recurrent_gla
    if not query.is_cuda:
        raise ValueError(
            f"`attn_mode={mode!r}` runs on a GPU, but the inputs are on {query.device}: "
            "move the model there, or use `attn_mode='auto'`."
        )
    return _fla_chunk if mode == "chunk" else _fla_fused_recurrent


def check_mode(mode: str) -> None:
    """Raises a `ValueError` for a mode that does not exist."""
    if mode == "fused_chunk":
        raise ValueError("`attn_mode='fused_chunk'`: flash-linear-attention has withdrawn it, use 'chunk'.")
    if mode not in MODES:
        raise ValueError(f"`attn_mode={mode!r}` is unknown: choose one of {', '.join(MODES)}.")


def check_installed(mode: str) -> None:
    """Raises a `ValueError` for a mode that needs what is not installed."""
    if mode in FLA_MODES and fla_kernels() is None:
        raise ValueError(
            f"`attn_mode={mode!r}` needs flash-linear-attention, which cannot be imported here: "
            "`pip install 'dllm-hf[fla]'` (Linux with a GPU), or use `attn_mode='auto'`."
        )


def recurrent_gla(query, key, value, log_decay, initial_state=None, reverse=False, output_final_state=True):
    """The recurrence token by token, which the other forms are tested against. In float32, or float64 if the inputs are."""
    compute = torch.promote_types(query.dtype, torch.float32)
    q, k, v, decay = (x.to(compute) for x in (query, key, value, log_decay))
    q, decay = q * q.shape[-1] ** -0.5, decay.exp()
    state = initial_state
    if state is None:
        state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    state = state.to(compute)
    length = q.shape[1]
    outputs = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        outputs[t] = (q[:, t, :, None] @ state).squeeze(-2)
    return torch.stack(outputs, dim=1).to(value.dtype), state if output_final_state else None


def chunk_gla(query, key, value, log_decay, initial_state=None, reverse=False, output_final_state=True):
    """The chunked form (arXiv:2312.06635, section 4): within `CHUNK` tokens two matrix products, from chunk to chunk
    the state. Decays are clamped at `MIN_LOG_DECAY`. It multiplies in float32, or float64 if the inputs are: in bfloat16
    the gradients of strong decays would be differences of rounded numbers."""
    length = query.shape[1]
    size = min(CHUNK, length)
    wide = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        # (batch, heads, chunks, size, dim); the padding of the last chunk neither decays nor adds to the state.
        q, k, v, g = (_chunks(x, size) for x in (query, key, value, log_decay))
        q, k, v = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide), v.to(wide)
        g = g.to(wide).clamp(min=MIN_LOG_DECAY)
        cumulative = g.cumsum(-2)
        total = cumulative[..., -1:, :]
        if reverse:
            cumulative = total - cumulative + g
        relative = cumulative - cumulative[..., size // 2 : size // 2 + 1, :]
        scores = (q * relative.exp()) @ (k * (-relative).exp()).mT
        output = (scores.triu() if reverse else scores.tril()) @ v
        several = output.shape[2] > 1 or initial_state is not None
        updates = state = None
        if several or output_final_state:
            updates = (k * (total - cumulative).exp()).mT @ v
            state = updates[:, :, 0]
        if several:
            q, keep = q * cumulative.exp(), total.mT.exp()
            state = torch.zeros_like(state) if initial_state is None else initial_state.to(wide)
            order = range(updates.shape[2])
            states = [None] * len(order)
            for chunk in reversed(order) if reverse else order:
                states[chunk] = state
                state = keep[:, :, chunk] * state + updates[:, :, chunk]
            output = output + q @ torch.stack(states, dim=2)
        output = output.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return output.to(value.dtype), state if output_final_state else None


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size)).unflatten(2, (-1, size))


@cache
def fla_kernels() -> tuple[Callable, Callable] | None:
    """`chunk_gla` and `fused_recurrent_gla` of flash-linear-attention, or None where it cannot be imported. Imported on
    the first use, since that takes seconds."""
    try:
        from fla.ops.gla import chunk_gla as fla_chunk_gla
        from fla.ops.gla import fused_recurrent_gla as fla_fused_recurrent_gla
    except Exception:  # without triton, or without a driver, the import fails in more ways than one
        return None
    return fla_chunk_gla, fla_fused_recurrent_gla


def _fla_chunk(query, key, value, log_decay, initial_state=None, reverse=False, output_final_state=True):
    most = max(LARGEST_GRID // query.shape[2], 1)
    if query.shape[0] > most:
        # A program for each head of each sequence, along a grid's last dimension.
        inputs = [x.split(most) for x in (query, key, value, log_decay)]
        states = [None] * len(inputs[0]) if initial_state is None else initial_state.split(most)
        parts = [_fla_chunk(*each, reverse, output_final_state) for each in zip(*inputs, states, strict=True)]
        outputs, last = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(last) if output_final_state else None
    inputs = query, key, value, log_decay
    if reverse:
        inputs = [x.flip(1) for x in inputs]
    output, state = fla_kernels()[0](*inputs, initial_state=initial_state, output_final_state=output_final_state)
    return output.flip(1) if reverse else output, state


def _fla_fused_recurrent(query, key, value, log_decay, initial_state=None, reverse=False, output_final_state=True):
    options = {"initial_state": initial_state, "output_final_state": output_final_state, "reverse": reverse}
    return fla_kernels()[1](query, key, value, log_decay, **options)


def short_convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The SiLU of a weighted sum over the tokens around each token, for each channel. As in `fla`, but centred, with zeros
    beyond the block.

    Args:
        x: `(blocks, block_size, channels)`.
        weight: `(channels, 1, size)`, of an odd size.
    """
    channels, _, size = weight.shape
    return F.silu(F.conv1d(x.mT, weight, padding=size // 2, groups=channels)).mT


def block_states(
    updates: torch.Tensor,
    log_decays: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
    group: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence over blocks, `S_i = diag(exp(d_i)) S_{i-1} + U_i`, for all blocks at once.

    Args:
        updates: `(batch, blocks, heads, key_dim, value_dim)`, `U`.
        log_decays: `(batch, blocks, heads, key_dim)`, `d`, at most 0.
        initial_state: `(batch, heads, key_dim, value_dim)`, before the first block; zeros if not given.
        samples: `(batch, blocks)`, the number of the sample that a block belongs to: the first block of a sample
            starts from zeros, and so does block 0 where its number is not 0.
        group: see [`_scan`].

    Returns:
        The state before each block, of the shape of `updates`, and the one after the last, as `initial_state`.
    """
    if initial_state is None:
        initial_state = torch.zeros_like(updates[:, 0])
    if torch.is_grad_enabled():
        return _BlockStates.apply(updates, log_decays, initial_state, samples, group)
    return _all_states(updates, log_decays, initial_state, samples, group)


def _all_states(updates, log_decays, initial_state, samples, group) -> tuple[torch.Tensor, torch.Tensor]:
    if samples is None:
        return _scan(updates, log_decays, initial_state, group)
    before, last = _scan(updates, log_decays, initial_state, group, F.pad(samples, (1, 0)))
    return before.masked_fill(_is_first(samples), 0), last


class _BlockStates(torch.autograd.Function):
    """The gradients of the states are the recurrence from the last block to the first, so that of a layer's largest tensors
    the states alone are kept for them."""

    @staticmethod
    def forward(ctx, updates, log_decays, initial_state, samples, group):
        before, last = _all_states(updates, log_decays, initial_state, samples, group)
        ctx.save_for_backward(before, log_decays, samples)
        ctx.group = group
        return before, last

    @staticmethod
    def backward(ctx, of_before, of_last):
        before, log_decays, samples = ctx.saved_tensors
        after = None if samples is None else torch.cat([samples, samples[:, -1:]], dim=1).flip(1)
        of_updates, of_initial = _scan(of_before.flip(1), log_decays.flip(1), of_last, ctx.group, after)
        of_updates = of_updates.flip(1)
        if samples is not None:
            is_first = _is_first(samples)
            of_updates = of_updates.masked_fill(
                torch.cat([is_first[:, 1:], torch.zeros_like(is_first[:, :1])], dim=1), 0
            )
            of_initial = of_initial.masked_fill(is_first[:, 0], 0)
        return of_updates, (of_updates * before).sum(-1) * log_decays.exp(), of_initial, None, None


def _is_first(samples: torch.Tensor) -> torch.Tensor:
    """`(batch, blocks, 1, 1, 1)`, whether a block is the first of a sample that starts from zeros."""
    return (samples != F.pad(samples, (1, 0))[:, :-1])[..., None, None, None]


def _scan(updates, log_decays, state, group, samples=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence from `state`: what each block finds, and what the last leaves. `samples`: `(batch, 1 + blocks)`, those of
    `state` and of the blocks; nothing of one is in what a block of another leaves.

    Within `group` blocks the states are weighted sums of the updates before them, one matrix product; the weights are
    exponentials of differences that are never positive. A loop runs over the groups. An exported program has one group,
    whose weights grow with the square of the number of blocks.
    """
    blocks = updates.shape[1]
    if isinstance(blocks, int):
        starts = range(0, blocks, group)
    else:  # exported for texts of any length: a loop would fix their number
        starts, group = range(1), blocks
    pieces = [state[:, None]]
    with torch.autocast(updates.device.type, enabled=False):
        for start in starts:
            decays = log_decays[:, start : start + group].permute(0, 2, 3, 1)  # (batch, heads, key_dim, blocks)
            cumulative = F.pad(decays.cumsum(-1), (1, 0))
            exponents = cumulative[..., 1:, None] - cumulative[..., None, :]
            # Row i: how much of the state before the group, and of each update, is left after block i.
            is_past = torch.ones(*exponents.shape[-2:], dtype=torch.bool, device=updates.device).tril(1)
            if samples is not None:
                here = samples[:, start : start + group + 1]
                is_past = is_past & (here[:, 1:, None] == here[:, None])[:, None, None]
            weights = torch.where(is_past, exponents, -torch.inf).exp()
            sources = torch.cat([state[:, None], updates[:, start : start + group]], dim=1).permute(0, 2, 3, 1, 4)
            after = (weights @ sources).permute(0, 3, 1, 2, 4)
            pieces.append(after)
            state = after[:, -1]
    if not isinstance(blocks, int):  # what has one block less would fix whether that is a single one
        return torch.cat(pieces, dim=1)[:, :-1], state
    return torch.cat([*pieces[:-1], pieces[-1][:, :-1]], dim=1), state
