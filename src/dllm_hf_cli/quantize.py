"""`dllm-hf quantize`."""

import argparse

from transformers.utils import logging

from dllm_hf.hub import quantize as quantize_repository

from .output import show, tell


def quantize(arguments: argparse.Namespace) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made = quantize_repository(arguments.model, arguments.out, arguments.weights, arguments.device)
    size = sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
    number = made.quantized + made.others
    if made.experts:
        tell(
            f"The experts, {made.experts:,} of {number:,} weights, stay as they are: torchao's filter is for linear layers."
        )
    show(f"Written: {made.path}, {size / 1e6:.1f} MB, {made.quantized:,} of {number:,} weights in {arguments.weights}")
    return 0
