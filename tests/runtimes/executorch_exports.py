"""Exports to ExecuTorch that the tests' files share, each done once."""

import os
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from dllm_hf.edge import DiffusionEdge, export_model

from .comparing import golden

EXAMPLE = (torch.zeros(3, 40, dtype=torch.long),)
# Lowering a layer takes some 15 seconds: one of each checkpoint, and int8 alone, unless all three are asked for.
LAYERS = int(os.environ.get("DLLM_HF_LAYERS", 1))


class Exports:
    """Models of the families and the folders that they are exported to, which the processes of pytest-xdist share.

    root: where the folders are, the same for all processes.
    """

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(exist_ok=True)
        self.exported, self.both = cache(self._exported), cache(self._both)

    def _exported(self, family: str, quantization: str | None = None) -> tuple:
        """The model, and its folder."""
        model = golden(family, LAYERS if quantization is None else 1)
        folder = self.root / f"{family}-{quantization}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                export_model(model, EXAMPLE, folder, quantization, block_length=4)
        return model, folder

    def _both(self, family: str) -> tuple:
        """The model, and what ExecuTorch makes of it."""
        model, folder = self.exported(family)
        return model, DiffusionEdge.from_pretrained(folder, num_threads=1)
