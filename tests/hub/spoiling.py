"""Making checkpoints that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_hf.hub import export
from dllm_hf.hub.checkpoint import WEIGHTS


def change(file: Path, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refusal(source, out=None, **options) -> str:
    """The message with which it is refused; nothing has been written then."""
    top = Path(source).parent
    before = everything(top)
    with pytest.raises((ValueError, OSError)) as refused:
        export(str(source), top / "out" if out is None else out, **options)
    assert everything(top) == before
    message = str(refused.value)
    assert message and "Traceback" not in message
    return message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]):
    """`change` the tensors of a checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rename(tensors: dict, old: str, new: str):
    tensors[new] = tensors.pop(old)
