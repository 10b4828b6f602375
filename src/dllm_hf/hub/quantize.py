"""Repositories with weights in 8 and 4 bits."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..quantization import quantization_config
from . import checkpoint
from .card import card_header, make_card
from .export import add_code, checked_model, new_folder, written_whole


class Quantized(NamedTuple):
    """A repository that was written. `quantized`, `others`: how many of its weights are in the format, and how many are not;
    `experts`: how many of these are a mixture's."""

    path: Path
    quantized: int
    others: int
    experts: int


def quantize(source: str, out: str | os.PathLike, weights: str, device: torch.device | str | None = None) -> Quantized:
    """Write a checkpoint with quantised weights as a repository that loads wherever torchao is, with `trust_remote_code` or
    with `import dllm_hf`.

    Args:
        source: a folder, or a repository's name: ours or an original.
        out: the folder to write; it must not exist, or be empty.
        weights: the format, see [`quantization_config`].
        device: on which the weights are quantised; a GPU if there is one.

    Raises:
        ImportError: torchao or accelerate is not installed.
        ValueError, OSError: why it cannot be. Nothing is written then.
    """
    target = new_folder(out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = quantization_config(weights, device)
    folder = checkpoint.fetch(source)
    for file in ("README.md", "config.json", "generation_config.json", *checkpoint.TOKENIZER_FILES):
        checkpoint.checked_path(folder, file)
    empty = checked_model(folder)
    checkpoint.read_generation_config(folder, empty)
    checkpoint.checked_weights(folder, empty)
    with checkpoint.failing_with(f"{folder} cannot be loaded with {weights} weights"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if weights == "int8" else torch.bfloat16,
            device_map={"": device},
            quantization_config=asked,
        )
    found = _count(model)
    if not found[0]:
        raise ValueError(
            f"None of the layers of {folder} can be in {weights}: their sizes must be multiples of "
            f"{128 if weights == 'int4' else 16}."
        )
    with written_whole(target) as made:
        model.save_pretrained(made)
        for file in checkpoint.TOKENIZER_FILES:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, made / file)
        add_code(made, model.config)
        card = make_card(model.config, target.resolve().name, None, card_header(folder), weights)
        (made / "README.md").write_text(card, encoding="utf-8")
    return Quantized(target, *found)


def _count(model: nn.Module) -> tuple[int, int, int]:
    """See [`Quantized`]."""
    quantized = sum(each.numel() for each in model.parameters() if type(each) is not nn.Parameter)
    experts = sum(each.numel() for name, each in model.named_parameters() if ".experts." in name)
    return quantized, sum(each.numel() for each in model.parameters()) - quantized, experts
