"""Self-contained repositories from a checkpoint's files."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from ..families import family
from ..generation.custom_generate import generate
from .bundle import bundle
from .card import card_header, make_card, make_loop_card
from .checkpoint import (
    TOKENIZER_FILES,
    checked_weights,
    empty_model,
    fetched,
    inside,
    read_generation_config,
    read_json,
    some,
)


def export(source: str, out: str | os.PathLike, config_only: bool = False, name: str | None = None) -> Path:
    """Write a repository that runs without this package from a checkpoint, ours or an original, without loading it.

    Args:
        source: a folder, or a repository's name.
        out: the folder to write; it must not exist, or be empty.
        config_only: without weights and tokenizer.
        name: what the card tells to load; the name of the folder `out` if not given.

    Returns:
        `out`. Weights are hard links to the source's where the file system allows it, else copies.

    Raises:
        ValueError, OSError: the source is not one that can be exported, and why. Nothing is written then.
    """
    out = _free(out)
    folder = fetched(source, weights=not config_only)
    beside = ["README.md", "generation_config.json", *([] if config_only else TOKENIZER_FILES)]
    for file in ["config.json", *beside]:
        inside(folder, file)
    values, model = _checked_config(folder)
    read_generation_config(folder, model)
    if not config_only and (folder / "tokenizer_config.json").is_file():
        read_json(folder / "tokenizer_config.json")
    weights = [] if config_only else _checked_weights(folder, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as made:
        made = Path(made) / "repository"
        made.mkdir()
        for file in [*weights, *beside[1:]]:
            if (folder / file).is_file():
                _link_or_copy(folder / file, made / file)
        values.pop("auto_map", None)
        _write_json(made / "config.json", values)
        add_code(made, model.config)
        origin = None if os.path.isdir(source) else str(source)
        card = make_card(model.config.model_type, name or out.resolve().name, origin, card_header(folder))
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
    values = read_json(folder / "config.json")
    values["auto_map"] = {auto: reference(cls) for auto, cls in classes.items()}
    values["architectures"] = [causal_lm.__name__]
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    settings.pop("auto_map", None)
    if own_tokenizer:
        values["auto_map"]["AutoTokenizer"] = [reference(tokenizer), None]
        settings["auto_map"] = {"AutoTokenizer": [reference(tokenizer), None]}
    if path.is_file():
        _write_json(path, settings)
    _write_json(folder / "config.json", values)


def export_loop(out: str | os.PathLike, name: str | None = None) -> Path:
    """Write the denoising loop as a repository for `model.generate(custom_generate=...)` of the library.

    Args:
        out: the folder to write; it must not exist, or be empty.
        name: what the card tells to load; the name of the folder `out` if not given.
    """
    out = _free(out)
    texts = bundle(generate)
    # The library calls `generate` of a file of this name.
    texts["generate.py"] = texts.pop("generation_custom_generate.py")
    (out / "custom_generate").mkdir(parents=True)
    for file, text in texts.items():
        (out / "custom_generate" / file).write_text(text, encoding="utf-8")
    (out / "README.md").write_text(make_loop_card(name or out.resolve().name), encoding="utf-8")
    return out


def _free(out: str | os.PathLike) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a folder that does not exist, or an empty one.")
    return out


def _checked_config(folder: Path) -> tuple[dict, PreTrainedModel]:
    """The values of `config.json` and the model that they describe, without weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} holds no checkpoint: it has no config.json.")
    values = read_json(path)
    try:
        _, model, causal_lm, _ = family(values.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"{path} says `architectures={architectures!r}`: it must be a list of names.")
    for name in architectures:
        if name not in (model.__name__, causal_lm.__name__):
            raise ValueError(
                f"{path} asks for `{name}`, which dllm_hf does not have: it has {causal_lm.__name__} for "
                f"`model_type={values['model_type']!r}`."
            )
    if values.get("quantization_config") is not None:
        raise ValueError(
            f"{path} has a `quantization_config`: export the weights before quantisation, and quantise them on loading."
        )
    return values, empty_model(folder)


def _checked_weights(folder: Path, model: PreTrainedModel) -> list[str]:
    files, unexpected = checked_weights(folder, model)
    if unexpected:
        raise ValueError(
            f"The weights in {folder} hold {some(unexpected)} for which the model in its config.json has no place: one "
            "of the files is of another model."
        )
    return files


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
