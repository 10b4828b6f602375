"""Keys and values in 8 bits with a scale for each head and token, in one of two encodings.

- `fp8`: float8_e4m3 (arXiv:2209.05433). A number keeps the same four significant bits under any scale, so that the best one
  would be no more precise than a power of two, which rounds nothing.
- `int8`: whole numbers from -127 to 127, each stored as the byte that is 128 more. A number is at most half a step off, and
  keys have 127 steps to the largest number: their scale is a 127th of it, rounded to bfloat16.

The scale of values is a power of two in both: attention adds its exponent to the scores. In int8 that leaves at least 64 steps,
which costs next to nothing: errors of keys move the weights, those of values are averaged.

A head with a NaN or an infinity has NaN as its scale, so that all of its numbers are NaN.
"""

import torch

LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn
ENCODINGS = {"fp8": LARGEST_FLOAT8, "int8": 127.0}  # and the largest number of each
# The bits of the smallest scale, 2**-100, as float32. It is above 0, so that it can be divided by.
SMALLEST = 27 << 23


def quantised(x: torch.Tensor, encoding: str, is_key: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`(..., size)` -> its numbers in 8 bits, uint8 of the same shape, and their scales, `(...)`, bfloat16."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    bits = (largest / ENCODINGS[encoding]).view(torch.int32)
    if encoding == "int8" and is_key:  # the nearest of bfloat16, to even
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0x7FFF0000
    else:  # the next power of two: the exponent is one more, unless the rest is 0
        bits = (bits + 0x7FFFFF) & 0x7F800000
    scales = bits.clamp(min=SMALLEST).view(torch.float32).where(largest < torch.inf, torch.nan)
    numbers = wide * (1 / scales)[..., None]
    if encoding == "fp8":
        in_bytes = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        in_bytes = (numbers.round().clamp(-127, 127) + 128).to(torch.uint8)
    return in_bytes, scales.to(torch.bfloat16)


def dequantised(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, encoding: str) -> torch.Tensor:
    """What [`quantised`] was given, with four significant bits (`fp8`) or in steps of the scale (`int8`)."""
    numbers = x.view(torch.float8_e4m3fn).float() if encoding == "fp8" else x.float() - 128
    return (numbers * scales[..., None].float()).to(dtype)
