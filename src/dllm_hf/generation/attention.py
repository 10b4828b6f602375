"""Attention back ends: SDPA instead of FlashAttention for masks that it ignores, and our kernel as a back end."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_bidirectional_mask, sdpa_mask
from transformers.utils import logging

from ..kernels.attention import canvas_attention
from ..kernels.triton import has_kernels

logger = logging.get_logger(__name__)

# Arguments of the attention of other models that the kernel does not implement.
CHANGES_SCORES = ("softcap", "position_bias", "s_aux", "cache")


def uses_flash_attention(config: PreTrainedConfig) -> bool:
    return "flash" in (config._attn_implementation or "")


@contextmanager
def without_flash_attention(config: PreTrainedConfig):
    """Replace FlashAttention, which would silently ignore the mask, by SDPA. For inference only: a backward pass that
    recomputes activations runs outside of this context."""
    attention = config._attn_implementation
    if uses_flash_attention(config):
        logger.warning_once(f"`{attention}` cannot mask this attention pattern: such forward passes use `sdpa`.")
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = attention


def mask_of_rule(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sees: Callable[..., torch.Tensor],
    past_key_values: Cache | None = None,
) -> torch.Tensor | BlockMask | None:
    """A mask for the attention in use: of what is no padding, a query sees what a rule says.

    Args:
        inputs_embeds: `(batch, length, ...)`, for shape, dtype and device.
        attention_mask: `(batch, keys)`, 0 on padding, or None.
        sees: `sees(row, head, query, key)`, a rule over indices, which are tensors that broadcast.
    """
    if config._attn_implementation != "sdpa" or past_key_values is not None:
        return create_bidirectional_mask(
            config, inputs_embeds, attention_mask, past_key_values=past_key_values, and_mask_function=sees
        )
    # The library would make the same by `vmap` over each index, which takes as long as ten small layers.
    rows, columns = (torch.arange(size, device=inputs_embeds.device) for size in inputs_embeds.shape[:2])
    mask = sees(rows[:, None, None, None], 0, columns[:, None], columns)
    return mask if attention_mask is None else mask & attention_mask[:, None, None].bool()


def canvas_mask(*args, **kwargs) -> torch.Tensor | None:
    """The mask of `attn_implementation="canvas"`: where each query sees a prefix of the keys, the lengths of the prefixes,
    `(batch, 1, queries, 1)` int32, 4-D so that transformers does not rebuild it; otherwise SDPA's mask."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or torch.compiler.is_compiling():  # reading the mask would break the compiled graph
        return mask
    lengths = mask.sum(-1, keepdim=True)
    if not torch.equal(mask, torch.arange(mask.shape[-1], device=mask.device) < lengths):
        return mask
    return lengths.to(torch.int32)


def canvas_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`attn_implementation="canvas"`: [`canvas_attention`] for inference on a GPU with a mask of lengths, see
    [`canvas_mask`], or without a mask; SDPA otherwise.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key, value: `(batch, kv_heads, keys, head_dim)`.
    """
    batch, _, queries, head_dim = query.shape
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    lengths = None
    if attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 1:
        lengths = attention_mask[:, 0, :, 0].expand(batch, -1)
        attention_mask = torch.arange(key.shape[2], device=key.device) < attention_mask
    elif attention_mask is None and not is_causal:
        lengths = torch.full((batch, queries), key.shape[2], dtype=torch.int32, device=key.device)
    has_kernel = has_kernels(query) and value.shape[-1] == head_dim and dropout == 0
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    changed = any(kwargs.get(name) is not None for name in CHANGES_SCORES)
    if has_kernel and lengths is not None and not needs_gradient and not changed:
        scale = head_dim**-0.5 if scaling is None else scaling
        if key.stride() != value.stride() or key.stride(0) % key.stride(2):
            key, value = key.contiguous(), value.contiguous()
        # The kernel checks no bounds: the first row is passed as the arena, with the other rows as extents behind it.
        base = torch.arange(batch, device=query.device) * (key.stride(0) // key.stride(2))
        with torch.cuda.device(query.device):  # Triton launches on the current device
            arguments = (query.transpose(1, 2), key[0], value[0], lengths, base, key.shape[2], scale)
            return canvas_attention(*arguments), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register("canvas", canvas_attention_forward)
AttentionMaskInterface.register("canvas", canvas_mask)
