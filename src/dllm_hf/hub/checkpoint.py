"""A checkpoint's files: where they are, and whether they are those of the model that `config.json` describes.

Nothing here loads a weight: what a file holds is read from its header, and the model is one without memory.
"""

import difflib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

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
def naming(problem: str):
    """Whatever fails inside becomes a `ValueError` that begins with `problem`: a file from elsewhere can fail in as many
    ways as there are libraries that read it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{problem}: {kind}{error}") from error


def fetched(source: str | os.PathLike, weights: bool = True, code: bool = False) -> Path:
    """The folder that holds a source's files: the source itself, or where its repository has been downloaded to.

    Args:
        weights: and the tokenizer; otherwise only the configurations and the card.
        code: the repository's own code as well.

    Raises:
        OSError: there is no such folder and no such repository. What looks like a mistyped path is not looked for on
            the Hub.
    """
    if os.path.isdir(source):
        return Path(source)
    source = str(source)
    if os.path.exists(source):
        raise OSError(f"{source} is not a folder: give one that holds a checkpoint, or a repository's name.")
    _refuse_mistyped(source)
    wanted = ["config.json", "generation_config.json", "README.md"]
    wanted += [*TOKENIZER_FILES, "*.safetensors", INDEX] if weights else []
    wanted += ["*.py"] if code else []
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # of the HTTP library below, which is another one in each version of huggingface_hub
        raise OSError(f"There is no folder {source}, and no repository of that name could be read: {error}") from error


def _refuse_mistyped(source: str) -> None:
    """A name on the Hub has one slash at most, and nobody means `hub_configs/x` where there is a folder `hub_configs`."""
    place = Path(source).parent
    try:
        beside = [path.name for path in place.iterdir() if path.is_dir()]
    except OSError:
        beside = []
    close = difflib.get_close_matches(Path(source).name, beside, n=1, cutoff=0.75)
    if source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1:
        repository = ""
    elif (close or ("/" in source and place.is_dir())) and not _is_cached(source):
        repository = f" If you mean the Hub's repository of that name, `hf download {source}` first."
    else:
        return
    hint = f": did you mean {place / close[0]}?" if close else "."
    raise OSError(f"There is no folder {source}{hint}{repository}")


def _is_cached(repository: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(repository, "config.json"), str)
    except ValueError:  # no name that a repository can have
        return False


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a checkpoint, which need not exist. A link that leads elsewhere would publish what is there:
    it is a `ValueError`. The Hub's cache consists of links, to places of its own."""
    path, top = folder / name, Path(os.path.realpath(folder))
    places = [top]
    if top.parent.name == "snapshots":
        places.append(top.parents[1] / "blobs")
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    if top.is_relative_to(cache):
        places.append(cache)
    target = Path(os.path.realpath(path))  # `Path.resolve` fails on links that go round in a circle
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(f"{path} is a link to {target}, outside of {folder}: put the file itself there.")
    return path


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return values


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's `config.json` describes, on the meta device."""
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} holds no model: it has no config.json.")
    read_json(path)
    with naming(f"{path} describes no model that can be built"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def read_generation_config(folder: Path, model: PreTrainedModel):
    """The options that a folder recommends; those of the model's configuration where it recommends none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return model.generation_config
    read_json(path)
    with naming(f"{path} cannot be used"):
        return model.generation_config_class.from_pretrained(folder)


def checked_weights(folder: Path, model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Compare the weight files of a folder with a model, as the library would load them.

    Args:
        model: from [`empty_model`]; not of use afterwards.

    Returns:
        The names of the files, the index included, and of tensors that have no place in the model.

    Raises:
        OSError, ValueError: a file is not there or not whole, or tensors are missing or of another shape.
    """
    files, index = _weight_files(folder)
    tensors = {}
    for file in files:
        tensors |= _tensors(inside(folder, file))
    with naming(f"The weights in {folder} cannot be those of its config.json"), _no_progress_bar():
        load = LoadStateDictConfig(
            device_map={"": torch.device("meta")},
            ignore_mismatched_sizes=True,
            weight_mapping=get_model_conversion_mapping(model),
        )
        info, _ = model._load_pretrained_model(model, tensors, None, load)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    refuse_gaps(folder, info.missing_keys, info.mismatched_keys, info.conversion_errors)
    return files + index, sorted(info.unexpected_keys)


def check_size(folder: Path, model: PreTrainedModel) -> None:
    """Of quantised weights, whose names and shapes only their library knows: whether the model can be in the files at
    all. Raises as [`checked_weights`] does."""
    files, _ = _weight_files(folder)
    size, numbers = sum((folder / file).stat().st_size for file in files), model.num_parameters()
    if numbers > 8 * size:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {numbers:,} numbers, and its weights have {size:,} bytes: one "
            "of the files is of another model."
        )


def refuse_gaps(folder: Path, missing, mismatched, unconvertible=()) -> None:
    """Raises a `ValueError` where the library's report on loading says that weights are not the file's."""
    problems = []
    if missing:
        problems.append(f"{some(missing)} missing")
    if mismatched:
        name, found, expected = min(mismatched)
        problems.append(f"{len(mismatched)} of another shape ({name} is {tuple(found)}, not {tuple(expected)})")
    if unconvertible:
        problems.append(f"{some(unconvertible)} not to be put together")
    if problems:
        raise ValueError(
            f"The weights in {folder} are not those of the model in its config.json: {'; '.join(problems)}. One of the "
            "files is of another model, or not complete: fetch both again."
        )


def some(names) -> str:
    """`3 tensors (a, b, ...)`"""
    names = sorted(names)
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _weight_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files that the library would read, and the index among them."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], []
    path = inside(folder, INDEX)
    if not path.is_file():
        raise OSError(f"{folder} has no {WEIGHTS} and no {INDEX}{_instead(folder)}.")
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


def _instead(folder: Path) -> str:
    """What to do about a folder without weights."""
    if [*folder.glob("*.bin")]:
        return ". There are pickled weights (*.bin): convert them to safetensors first"
    base = card_header(folder).get("base_model")
    if isinstance(base, str):
        return f": these are settings, without weights. Load {base}, which its README.md names"
    return ": these are settings, without weights. Give a folder that holds weights, or a repository"


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which is checked to be whole, without memory."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    except Exception as error:  # of a library in Rust
        raise ValueError(f"{path} is cut short or no safetensors file ({error}): fetch it again.") from error


@contextmanager
def _no_progress_bar():
    """Nothing is loaded that would take its time."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
