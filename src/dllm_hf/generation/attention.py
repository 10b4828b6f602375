"""Attention back ends: keeping FlashAttention away from masks that it would ignore."""

from contextlib import contextmanager

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


def uses_flash_attention(config: PreTrainedConfig) -> bool:
    return "flash" in (config._attn_implementation or "")


@contextmanager
def without_flash_attention(config: PreTrainedConfig):
    """Run on SDPA what FlashAttention would silently get wrong. For inference only: a backward pass that recomputes
    activations would run outside of this context."""
    attention = config._attn_implementation
    if uses_flash_attention(config):
        logger.warning_once(f"`{attention}` cannot mask this attention pattern: such forward passes use `sdpa`.")
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = attention
