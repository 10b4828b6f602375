"""torchao's int8 weights of rows of any magnitude.

torchao (0.18) makes no scale smaller than 2^-23: rows whose largest weight is below 2^-16 lose bits, and below 2^-24 become
zeros, as those of projections before norms that change nothing (`sdar/identity_norms.py`).
"""

from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig as TorchaoConfig
from torchao.quantization import quantize_
from torchao.quantization.transform_module import register_quantize_module_handler


class Int8WeightOnlyConfig(TorchaoConfig):
    """torchao's, and written to `config.json` by the same name: what it quantised loads wherever torchao is."""


@register_quantize_module_handler(Int8WeightOnlyConfig)
def _quantize(module: nn.Linear, config: Int8WeightOnlyConfig) -> nn.Module:
    """Each row over the power of two above its largest weight, and its scale times that: both are exact."""
    dtype, tiny = module.weight.dtype, torch.finfo(module.weight.dtype).tiny
    largest = torch.linalg.vector_norm(module.weight.detach(), torch.inf, dim=1, keepdim=True).float()
    largest = largest.clamp(tiny, 1 / tiny)
    powers = largest / torch.frexp(largest).mantissa
    module.weight = nn.Parameter(module.weight.detach() / powers.to(dtype), requires_grad=False)
    quantize_(module, TorchaoConfig(**vars(config)), lambda *_: True)
    weight: Any = module.weight
    weight.scale = weight.scale * powers
    return module
