"""Weights in 8 and 4 bits: what torchao is asked for, and where it runs."""

from typing import Any

import torch
from torch import nn
from transformers import TorchAoConfig

FORMATS = ("fp8", "int8", "int4")
KINDS = {"Float8Tensor": "fp8", "Int8Tensor": "int8", "Int4TilePackedTo4dTensor": "int4"}  # by torchao's class


def quantization_config(weights: str, device: torch.device | str | None = None) -> TorchAoConfig:
    """For `from_pretrained(..., quantization_config=quantization_config("fp8"))`: the linear layers, with the head unless it is
    tied to the embedding. The experts of a mixture are no linear layers and stay as they are.

    Args:
        weights: `fp8`, a scale for each row of the weights and of their inputs, which are quantised as they come; `int8`, a
            scale for each row of the weights; `int4`, a scale and a zero for each 128 weights of a row, the head in 16 bits.
        device: where the model is going to run; a GPU if there is one.

    Raises:
        ImportError: torchao is not installed.
        ValueError: the device cannot multiply with such weights.
    """
    if weights not in FORMATS:
        raise ValueError(f"`weights={weights!r}` is unknown: choose one of {', '.join(FORMATS)}.")
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int4WeightOnlyConfig,
            PerRow,
        )

        from .int8_config import Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError(
            f'Weights in 8 and 4 bits are an extra: `pip install "dllm-hf[quantize]"`. {error}'
        ) from error
    check_device(weights, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    # GLADream's kernels read the projections to the decays themselves.
    others = [r".*\.gk_proj\.1"]
    # torchao would otherwise change options of Inductor for the whole process.
    if weights == "fp8":
        return TorchAoConfig(
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
            modules_to_not_convert=others,
        )
    if weights == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=others)
    packed = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    return TorchAoConfig(packed, modules_to_not_convert=["lm_head", *others])


def check_device(weights: str, device: torch.device) -> None:
    """Raises a `ValueError` where weights of a format cannot be made, or multiplied with, on the device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needed = {"fp8": (8, 9), "int4": (8, 0)}.get(weights)
    if needed is not None and (capability is None or capability < needed):
        found = "a CPU" if capability is None else torch.cuda.get_device_name(device)
        raise ValueError(
            f"{weights} weights need an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or more, and this is {found}: "
            "take int8, which runs anywhere."
        )


def check_runs(model: nn.Module) -> None:
    """Raises a `ValueError` where a model has weights that its device cannot multiply with (in fp8, which it cannot make, a CPU
    can), or that were quantised to zeros."""
    check: Any = getattr(model, "check_weights", None)
    if check is not None:
        check()
    found = {(KINDS.get(type(each).__name__, ""), each.device) for each in model.parameters()}
    for weights, device in found:
        if (weights, device.type) != ("fp8", "cpu"):
            check_device(weights, device)
