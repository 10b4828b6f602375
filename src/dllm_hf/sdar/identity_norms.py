"""Norms of queries and keys that change nothing, in an SDAR that started from a model without them.

The RMS norm `weight * x / sqrt(mean(x^2) + eps)` of an x far smaller than `sqrt(eps)` is a product, `weight / sqrt(eps) * x`.
On disk the projections are therefore multiplied by 2^-24, which is exact, and the norms' weights are `sqrt(eps) * 2^24`: a
checkpoint that any SDAR reads. No optimizer can train such projections. In training `nn.Identity` stands in the place of
the norms, and the projections have their usual size.
"""

import math
from typing import Any

import torch
from torch import nn

SCALE = 2.0**-24
# Of weights in bfloat16 the product, all that attention depends on, is closer to the exact one than this.
TOLERANCE = 1e-3
# The smallest scale of torchao's int8 weights; ours are smaller where they must be (`int8_config.py`). bitsandbytes makes
# float16 of the weights first, whose precision ends at its smallest normal number.
SMALLEST_SCALE = 2.0**-23
SMALLEST_FLOAT16 = 2.0**-14


def norm_weights(eps: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of the norms of queries, `q`, and of keys, `k`: of the numbers that the type has, the pair whose product
    is closest to `eps / SCALE^2`."""
    if dtype == torch.float16:
        raise ValueError("float16 is too narrow for norms that change nothing: save the model in bfloat16 or float32.")
    exact = math.sqrt(eps) / SCALE
    of_queries = (exact * (1 + torch.arange(128, dtype=torch.float64) / 256)).to(dtype)
    of_keys = (exact**2 / of_queries.double()).to(dtype)
    best = (of_queries.double() * of_keys.double() - exact**2).abs().argmin()
    return {"q": of_queries[best], "k": of_keys[best]}


def drop_norms(attention: Any) -> None:
    """Put `nn.Identity` in the place of the norms of queries and keys. `state_dict` goes on writing them, and
    `load_state_dict` reads them."""
    attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
    attention.register_state_dict_post_hook(_write)
    attention.register_load_state_dict_pre_hook(_read)


def _write(attention: Any, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata) -> None:
    for name, weight in norm_weights(attention.config.rms_norm_eps, attention.q_proj.weight.dtype).items():
        projection = f"{prefix}{name}_proj."
        for key in [key for key in state_dict if key.startswith(projection)]:
            state_dict[key] = state_dict[key] * SCALE
        device = attention.q_proj.weight.device
        state_dict[f"{prefix}{name}_norm.weight"] = weight.to(device).repeat(attention.head_dim)


def _read(attention: Any, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    norms = [state_dict.pop(f"{prefix}{name}_norm.weight", None) for name in "qk"]
    if norms[0] is None or norms[1] is None:
        return  # parameters of a model without norms
    product = norms[0].double() * norms[1].double() * SCALE**2 / attention.config.rms_norm_eps
    if ((product - 1).abs() > TOLERANCE).any():
        raise ValueError(
            f"`{prefix}q_norm.weight` and `{prefix}k_norm.weight` are not those of norms that change nothing: load the "
            "checkpoint with `from_pretrained`, and leave the norms as they are."
        )
    for name in "qk":
        projection = f"{prefix}{name}_proj."
        for key in [key for key in state_dict if key.startswith(projection)]:
            state_dict[key] = state_dict[key] / SCALE


def check_projections(name: str, attention: Any) -> None:
    """Raises a `ValueError` where the numbers of a loaded attention, `name`, are too coarse for its small projections of queries
    and keys: it would attend to all tokens alike."""
    for kind in ("q_proj", "k_proj") if not isinstance(attention.q_norm, nn.Identity) else ():
        weight = getattr(attention, kind).weight
        if weight.dtype == torch.float16:
            raise ValueError(
                f"`{name}.{kind}` is in float16, which has no numbers as small as its weights (`config.has_identity_norms`): load "
                "the model in bfloat16 or float32."
            )
        if _is_lost(weight):
            raise ValueError(
                f"`{name}.{kind}` was quantised to zeros: its weights (`config.has_identity_norms`) are smaller than the int8 of "
                "torchao and bitsandbytes can hold. Quantise the model before that with `dllm-hf quantize` or "
                '`dllm_hf.quantization.quantization_config("int8")`.'
            )


def _is_lost(weight: Any) -> bool:
    """Whether all scales of a quantised weight are the smallest, or the largest weights of all rows too small."""
    scale, largest = getattr(weight, "scale", None), getattr(weight, "SCB", None)  # of torchao, of bitsandbytes
    if isinstance(scale, torch.Tensor) and not scale.is_meta:
        return bool((scale == SMALLEST_SCALE).all())
    return isinstance(largest, torch.Tensor) and not largest.is_meta and bool((largest < SMALLEST_FLOAT16).all())
