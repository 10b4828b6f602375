"""Self-contained repositories: what is in them, from a model in memory or from a checkpoint's files, and publishing."""

import json
import math
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, PreTrainedModel

from ..families import family
from ..generation.custom_generate import generate
from .bundle import bundle
from .card import card_header, make_card, make_loop_card

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


def export(source: str, out: str | os.PathLike, config_only: bool = False, name: str | None = None) -> Path:
    """Write a repository that runs without this package from a checkpoint, ours or an original, without loading it.

    Args:
        source: a folder, or a repository's name.
        out: the folder to write; it must not exist, or be empty.
        config_only: without weights and tokenizer.
        name: what the card tells to load; `out` if not given.

    Returns:
        `out`. Weights are hard links to the source's where the file system allows it, else copies.

    Raises:
        ValueError, OSError: the source is not one that can be exported, and why. Nothing is written then.
    """
    out = _free(out)
    folder = _fetched(source, config_only)
    values, model = _checked_config(folder)
    config = model.config
    for beside in ("generation_config.json", *(() if config_only else ("tokenizer_config.json",))):
        if (folder / beside).is_file():
            _read_json(folder / beside)
    weights = [] if config_only else _checked_weights(folder, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as made:
        made = Path(made) / "repository"
        made.mkdir()
        for file in [*weights, *([] if config_only else TOKENIZER_FILES)]:
            if (folder / file).is_file():
                _link_or_copy(folder / file, made / file)
        values.pop("auto_map", None)
        _write_json(made / "config.json", values)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", made / "generation_config.json")
        add_code(made, config)
        card = make_card(config.model_type, name or str(out), version("dllm-hf"), source, card_header(folder))
        (made / "README.md").write_text(card, encoding="utf-8")
        made.chmod(0o755)
        if out.exists():
            for file in made.iterdir():
                file.rename(out / file.name)
        else:
            made.rename(out)
    return out


def add_code(folder: Path, config) -> None:
    """Put the code of a configuration's family into a saved folder, and say in its files which class is which."""
    config_class, model, causal_lm, tokenizer = family(config.model_type)
    classes = {"AutoConfig": config_class, "AutoModel": model, "AutoModelForCausalLM": causal_lm}
    own_tokenizer = tokenizer.__module__.split(".")[0] == __name__.split(".")[0]
    for name, text in bundle(*classes.values(), *([tokenizer] if own_tokenizer else [])).items():
        (folder / name).write_text(text, encoding="utf-8")
    reference = lambda cls: f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
    values = _read_json(folder / "config.json")
    values["auto_map"] = {auto: reference(cls) for auto, cls in classes.items()}
    values["architectures"] = [causal_lm.__name__]
    path = folder / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    settings.pop("auto_map", None)
    if own_tokenizer:
        values["auto_map"]["AutoTokenizer"] = [reference(tokenizer), None]
        settings["auto_map"] = {"AutoTokenizer": [reference(tokenizer), None]}
    if path.is_file():
        _write_json(path, settings)
    _write_json(folder / "config.json", values)


def export_loop(out: str | os.PathLike) -> Path:
    """Write the denoising loop as a repository for `model.generate(custom_generate=...)` of the library.

    Args:
        out: the folder to write; it must not exist, or be empty.
    """
    out = _free(out)
    texts = bundle(generate)
    # The library calls `generate` of a file of this name.
    texts["generate.py"] = texts.pop("generation_custom_generate.py")
    (out / "custom_generate").mkdir(parents=True)
    for name, text in texts.items():
        (out / "custom_generate" / name).write_text(text, encoding="utf-8")
    (out / "README.md").write_text(make_loop_card(str(out), version("dllm-hf")), encoding="utf-8")
    return out


def push(
    folder: str | os.PathLike, repo_id: str, token: str | None = None, private: bool | None = None, **options
) -> str:
    """Publish a folder as one commit: what fails before the commit is made has published nothing.

    Args:
        options: of `HfApi.create_commit`.

    Returns:
        The address of the commit.

    Raises:
        OSError: it was not published; the message says why.
    """
    api = HfApi(token=token)
    options = {"commit_message": "Upload with dllm_hf", **options}
    folder = Path(folder)
    files = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    committing = False
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # `upload_folder` would make several commits of many files.
        api.preupload_lfs_files(repo_id, files, free_memory=False)
        committing = True
        return api.create_commit(repo_id, files, **options).commit_url
    except Exception as error:  # of the HTTP library below, which is another one in each version of huggingface_hub
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if committing and not isinstance(error, HfHubHTTPError):
            raise OSError(
                f"{repo_id} may not have been published: {reason}. The connection was lost while the commit was made: "
                "look whether it is there, or push again."
            ) from error
        raise OSError(
            f"{repo_id} was not published: {reason}. The files go in one commit, so nothing of this upload is visible "
            "there. Check the token (`hf auth login`), its right to write, and the network, then push again: what has "
            "been uploaded is not sent twice."
        ) from error


def add_saving_with_code(model_class: type) -> None:
    """Give a class `save_pretrained(..., include_code=True)`, and a `push_to_hub` that includes the code.

    It is done to the classes from outside, since their files go into the repositories, where this module is not.
    """
    inherited = model_class.save_pretrained

    def save_pretrained(self, save_directory, *args, include_code: bool = False, push_to_hub: bool = False, **kwargs):
        """As the library's. With `include_code` the folder is a repository that runs without dllm_hf."""
        if push_to_hub and include_code:
            raise ValueError(
                "`push_to_hub=True` with `include_code=True`: call `model.push_to_hub(...)`, which does both."
            )
        inherited(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if include_code:
            folder = Path(save_directory)
            add_code(folder, self.config)
            if not (folder / "README.md").exists():
                card = make_card(self.config.model_type, str(save_directory), version("dllm-hf"), None, {})
                (folder / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_code: bool = True,
        token: str | None = None,
        private: bool | None = None,
        max_shard_size: int | str = "50GB",
        tokenizer=None,
        **options,
    ) -> str:
        """Publish the model as one commit, with the code that it needs (`include_code=False`: without) and, if given,
        its tokenizer. `options`: of `HfApi.create_commit`. Raises an `OSError` if it was not published."""
        with tempfile.TemporaryDirectory() as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            self.save_pretrained(folder, max_shard_size=max_shard_size, include_code=include_code)
            card = make_card(self.config.model_type, repo_id, version("dllm-hf"), None, {})
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return push(folder, repo_id, token, private, **options)

    model_class.save_pretrained, model_class.push_to_hub = save_pretrained, push_to_hub


def _free(out: str | os.PathLike) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a folder that does not exist, or an empty one.")
    return out


def _fetched(source: str, config_only: bool) -> Path:
    """The folder that holds the source's files."""
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source) or str(source).startswith(("/", ".", "~")):
        raise OSError(f"{source} is not a folder: give one that holds a checkpoint, or a repository's name.")
    wanted = ["config.json", "generation_config.json", "README.md"]
    if not config_only:
        wanted += [*TOKENIZER_FILES, "*.safetensors", INDEX]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # as in `push`
        raise OSError(f"There is no folder {source}, and no repository of that name could be read: {error}") from error


def _checked_config(folder: Path) -> tuple[dict, PreTrainedModel]:
    """The values of `config.json` and the model that they describe, without weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} holds no checkpoint: it has no config.json.")
    values = _read_json(path)
    _, model, causal_lm, _ = family(values.get("model_type"))
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"{path} says `architectures={architectures!r}`: it must be a list of names.")
    for name in architectures:
        if name not in (model.__name__, causal_lm.__name__):
            raise ValueError(
                f"{path} asks for `{name}`, which dllm_hf does not have: it has {causal_lm.__name__} for "
                f"`model_type={values['model_type']!r}`."
            )
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            built = causal_lm(config)
    except Exception as error:  # there are as many kinds as ways for values to be wrong
        raise ValueError(f"{path} describes no model that can be built: {error}") from error
    return values, built


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return values


def _checked_weights(folder: Path, model: PreTrainedModel) -> list[str]:
    """The weight files, all there and whole, with as many numbers as the model has."""
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is not the index of a checkpoint: {error!r}.") from error
        if not files:
            raise ValueError(f"{folder / INDEX} is an index that names no file.")
        outside = [file for file in files if not isinstance(file, str) or Path(file).name != file]
        if outside:
            raise ValueError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of this folder.")
        names = [*files, INDEX]
    elif (folder / WEIGHTS).is_file():
        files = names = [WEIGHTS]
    else:
        pickled = (
            " There are pickled weights (*.bin): convert them to safetensors first." if [*folder.glob("*.bin")] else ""
        )
        raise OSError(f"{folder} has no {WEIGHTS} and no {INDEX}.{pickled}")
    shapes = {}
    for file in files:
        if not (folder / file).is_file():
            raise OSError(f"{folder} lacks {file}, which its index names: fetch the missing shard.")
        shapes |= _header(folder / file)
    # Names and shapes are the original's, and differ: their sum does not. A tied head may be in the file or not.
    found = sum(math.prod(shape) for tensor, shape in shapes.items() if not tensor.endswith("inv_freq"))
    expected = [
        sum(tensor.numel() for _, tensor in model.named_parameters(remove_duplicate=once)) for once in (True, False)
    ]
    if found not in expected:
        raise ValueError(
            f"The weights in {folder} hold {found:,} numbers, but config.json describes a model of {expected[0]:,}: one "
            "of the files is of another model."
        )
    return names


def _header(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file, which is checked to be whole (the format: 8 bytes of length, a JSON header, data)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short or no safetensors file: fetch it again.")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: list(entry["shape"]) for name, entry in tensors.items()}
            whole = 8 + length + end == size
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path} has no header that can be read: fetch it again.") from error
    if not whole:
        raise ValueError(f"{path} has {size} bytes where its header speaks of {8 + length + end}: fetch it again.")
    return shapes


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # the cache of the library has links to its files
    if target.suffix != ".safetensors":  # tokenizers write into their files, and the source is not theirs
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
