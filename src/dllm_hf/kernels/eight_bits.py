"""Keys and values in 8 bits: float8_e4m3 (arXiv:2209.05433) with a scale for each head and token.

The scale is a power of two. A number keeps the same four significant bits under any scale, so that the best one would be no
more precise; and with a power of two nothing is rounded but the 8 bits themselves: a scale is exact in bfloat16, and so is each
number that is read, as the product of both.
"""

import torch

LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn
# The bits of the smallest scale, 2**-100, as float32. It is above 0, so that it can be divided by.
SMALLEST = 27 << 23


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(..., size)` -> its numbers in 8 bits, uint8 of the same shape, and their scales, `(...)`, bfloat16: the smallest power
    of two with which the largest number has room. A NaN stays one."""
    wide = x.float()
    scales = wide.abs().amax(-1) / LARGEST_FLOAT8
    # The next power of two: the exponent is one more, unless the rest is 0.
    bits = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scales = bits.clamp(min=SMALLEST).view(torch.float32)
    return (wide / scales[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scales.to(torch.bfloat16)


def dequantised(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What [`quantised`] was given, with four significant bits."""
    return (x.view(torch.float8_e4m3fn).float() * scales[..., None].float()).to(dtype)
