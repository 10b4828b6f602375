"""What the exporters to other runtimes share: checks of the model, and the folder around its program."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..hub.checkpoint import TOKENIZER_FILES, fetch
from .exported import CONFIG, CONTRACT, FAMILIES, Format, hash_of

logger = logging.get_logger(__name__)


def check_exportable(model: Any, target: Path, runtime: str, refused: dict[str, str]) -> None:
    """Raises a `ValueError` where a model cannot be exported, or not to `target`.

    Args:
        refused: the reason for each `model_type` that the runtime cannot run, and for `experts`.
    """
    name = "experts" if hasattr(model.config, "num_experts") else model.config.model_type
    if name in refused:
        raise ValueError(
            f"{type(model).__name__} cannot be exported to {runtime}: {refused[name]}. Decode with the model itself."
        )
    if name not in FAMILIES:
        raise ValueError(f"`model_type={name!r}` is none of the families that can be exported ({', '.join(FAMILIES)}).")
    rope = model.model.rotary_emb.rope_type
    if "dynamic" in rope or rope == "longrope":
        raise ValueError(f"`rope_type={rope!r}` cannot be exported: its angles depend on the longest text of a pass.")
    check_new(target)


def check_new(target: str | os.PathLike) -> None:
    """Raises a `ValueError` if there is something at `target`. The commands call it before they load a model."""
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: give a folder that does not exist.")


@contextmanager
def new_folder(target: Path) -> Iterator[tuple[Path, Path]]:
    """A folder to fill, which is renamed to `target` in the end, and one for what is temporary. Whatever fails, `target` does
    not exist then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        yield folder, Path(temporary)
        folder.rename(target)


def tokenizer_folder(model: Any) -> Path | None:
    """Where the tokenizer of the checkpoint is that a model was loaded from, a folder or a repository of the Hub; None, with a
    warning, where there is none, and for a model that was loaded from nowhere."""
    name = model.config.name_or_path
    if not name:
        return None
    try:
        folder = fetch(name)
        if any((folder / file).is_file() for file in TOKENIZER_FILES):
            return folder
    except OSError:  # the folder has gone, or the repository cannot be reached
        pass
    logger.warning(f"{name} has no tokenizer that can be read: the export has none either.")
    return None


def describe(model: Any, folder: Path, form: Format, **more: Any) -> None:
    """Write what stands beside the program: configurations, the tokenizer of the checkpoint, and the description."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if source := tokenizer_folder(model):
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
    description = {"format": form.version, "family": model.config.model_type, **more}
    description |= {each: getattr(model, each) for each in [*CONTRACT, "default_block_length"]}
    description["config"] = {name: getattr(model.config, name, None) for name in CONFIG}
    description["config"]["head_dim"] = model.model.layers[0].self_attn.head_dim
    description["sha256"] = {file: hash_of(folder / file) for file in form.files}
    (folder / form.description).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
