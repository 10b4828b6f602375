"""A checkpoint's files: where they are, and whether they are those of the model that `config.json` describes.

No weight is loaded: names and shapes of tensors are read from a file's header, and the model is on the meta device.
"""

import difflib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..generation.configuration import DiffusionGenerationConfig
from .card import card_header

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def failing_with(problem: str):
    """Every exception inside becomes a `ValueError` that begins with `problem`: a file from elsewhere can fail in as
    many ways as there are libraries that read it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{problem}: {kind}{error}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fetch(source: str | os.PathLike, weights: bool = True, code: bool = False) -> Path:
    """The folder that holds a source's files: the source itself, or the folder to which its repository is downloaded.

    Args:
        weights: download weights and tokenizer as well as the configurations and the card.
        code: download the repository's own code as well.

    Raises:
        OSError: there is no such folder and no such repository. A name that looks like a mistyped path is not looked
            for on the Hub.
    """
    source = str(source)
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source):
        raise OSError(f"{source} is not a folder: give one that holds a checkpoint, or a repository's name.")
    _refuse_mistyped(source)
    wanted = ["config.json", "generation_config.json", "README.md"]
    wanted += [*TOKENIZER_FILES, "*.safetensors", INDEX] if weights else []
    wanted += ["*.py"] if code else []
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # versions of huggingface_hub differ in the HTTP library whose errors they let through
        raise OSError(f"There is no folder {source}, and no repository of that name could be read: {error}") from error


def _refuse_mistyped(source: str) -> None:
    """Raises an `OSError` for a path: a name on the Hub has one slash at most, and where there is a folder
    `hub_configs`, `hub_configs/x` is taken for a path."""
    parent = Path(source).parent
    folders = [path.name for path in parent.iterdir() if path.is_dir()] if os.path.isdir(parent) else []
    close = difflib.get_close_matches(Path(source).name, folders, n=1, cutoff=0.75)
    if source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1:
        repository = ""
    elif (close or ("/" in source and os.path.isdir(parent))) and not _is_cached(source):
        repository = f" If you mean the Hub's repository of that name, `hf download {source}` first."
    else:
        return
    hint = f": did you mean {parent / close[0]}?" if close else "."
    raise OSError(f"There is no folder {source}{hint}{repository}")


def _is_cached(repository: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(repository, "config.json"), str)
    except ValueError:  # not the name of a repository
        return False


def checked_path(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file, which need not exist. A link to a file outside of the folder is a `ValueError`,
    since the export would publish that file; the Hub's cache consists of links to its own blobs, which are allowed."""
    path, top = folder / name, Path(os.path.realpath(folder))
    allowed = [top]
    if top.parent.name == "snapshots":
        allowed.append(top.parents[1] / "blobs")
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    if top.is_relative_to(cache):
        allowed.append(cache)
    target = Path(os.path.realpath(path))  # `Path.resolve` fails on circular links
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise ValueError(f"{path} is a link to {target}, outside of {folder}: put the file itself there.")
    return path


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise OSError(f"{path.parent} holds no checkpoint: it has no {path.name}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return values


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's `config.json` describes, on the meta device."""
    with failing_with(f"{folder / 'config.json'} describes no model that can be built"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def read_generation_config(folder: Path, model: Any) -> DiffusionGenerationConfig:
    """A folder's `generation_config.json`; where there is none, that of the model, a `PreTrainedModel` with
    `DiffusionGenerationMixin`."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return model.generation_config
    read_json(path)
    with failing_with(f"{path} cannot be used"):
        return model.generation_config_class.from_pretrained(folder)


def checked_weights(folder: Path, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Compare the weight files of a folder with a model, as transformers would load them.

    Args:
        model: from [`empty_model`]; it cannot be used afterwards.

    Returns:
        The names of the files, the index included, and the names of tensors that the model does not have.

    Raises:
        OSError, ValueError: a file is not there or not whole, or tensors are missing or of another shape.
    """
    files, index = _weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= _tensors(checked_path(folder, file))
    with failing_with(f"The weights in {folder} cannot be those of its config.json"), _no_progress_bar():
        load = LoadStateDictConfig(
            device_map={"": torch.device("meta")},
            ignore_mismatched_sizes=True,
            weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]  # a mistake of transformers
        )
        info, _ = model._load_pretrained_model(model, tensors, None, load)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    refuse_gaps(folder, info.missing_keys, info.mismatched_keys, info.conversion_errors)
    return files + index, sorted(info.unexpected_keys)


def check_size(folder: Path, model: PreTrainedModel) -> None:
    """Refuse quantised weights whose files are too small for the model: only the quantisation's library knows the names
    and shapes of their tensors. Raises as [`checked_weights`] does."""
    files, _ = _weight_files(folder)
    size, numbers = sum((folder / file).stat().st_size for file in files), model.num_parameters()
    if numbers > 8 * size:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {numbers:,} numbers, and its weights have {size:,} bytes: one "
            "of the files is of another model."
        )


def refuse_gaps(folder: Path, missing, mismatched, unconvertible=()) -> None:
    """Raises a `ValueError` where transformers' report on loading names weights that do not come from the files."""
    problems = []
    if missing:
        problems.append(f"{summary_of(missing)} missing")
    if mismatched:
        name, found, expected = min(mismatched)
        problems.append(f"{len(mismatched)} of another shape ({name} is {tuple(found)}, not {tuple(expected)})")
    if unconvertible:
        problems.append(f"{summary_of(unconvertible)} not to be put together")
    if problems:
        raise ValueError(
            f"The weights in {folder} are not those of the model in its config.json: {'; '.join(problems)}. One of the "
            "files is of another model, or not complete: fetch both again."
        )


def summary_of(names) -> str:
    """`3 tensors (a, b, ...)`"""
    names = sorted(names)
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _weight_files(folder: Path) -> tuple[list[str], list[str]]:
    """The weight files that transformers would read, and their index where there is one."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], []
    path = checked_path(folder, INDEX)
    if not path.is_file():
        raise OSError(f"{folder} has no {WEIGHTS} and no {INDEX}{_remedy(folder)}.")
    try:
        files = sorted(set(read_json(path)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {error!r}.") from error
    if not files:
        raise ValueError(f"{path} is an index that names no file.")
    outside = [file for file in files if not isinstance(file, str) or Path(file).name != file]
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}, which is not a file of this folder.")
    for file in files:
        if not (folder / file).is_file():
            raise OSError(f"{folder} lacks {file}, which its index names: fetch the missing shard.")
    return files, [INDEX]


def _remedy(folder: Path) -> str:
    """The end of the sentence on a folder without weights: what to do about it."""
    if [*folder.glob("*.bin")]:
        return ". There are pickled weights (*.bin): convert them to safetensors first"
    base = card_header(folder).get("base_model")
    if isinstance(base, str):
        return f": these are settings, without weights. Load {base}, which its README.md names"
    return ": these are settings, without weights. Give a folder that holds weights, or a repository"


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on the meta device. Raises a `ValueError` if the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except Exception as error:  # safetensors is written in Rust and raises exceptions of its own
        raise ValueError(f"{path} is cut short or no safetensors file ({error}): fetch it again.") from error


@contextmanager
def _no_progress_bar():
    """transformers' bar for loading would be shown, though no weight is loaded."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
