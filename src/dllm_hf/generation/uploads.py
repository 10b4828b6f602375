"""Tensors of the host on the device."""

import torch


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. To a GPU it goes by way of pinned memory: a copy from other memory would wait for all that the GPU
    has to do before, and the host with it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
