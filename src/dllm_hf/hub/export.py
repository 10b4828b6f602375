"""Self-contained repositories from a checkpoint's files."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from ..families import family, lines_of, stranger
from ..generation.custom_generate import generate
from . import checkpoint
from .bundle import bundle
from .card import card_header, make_card, make_loop_card


def export(source: str, out: str | os.PathLike, config_only: bool = False, name: str | None = None) -> Path:
    """Write a repository that runs without this package from a checkpoint, ours or an original, without loading it.

    Args:
        source: a folder, or a repository's name.
        out: the folder to write; it must not exist, or be empty.
        config_only: without weights and tokenizer.
        name: of the repository, which the card's example loads; the name of the folder `out` if not given.

    Returns:
        `out`. Weights are hard links to the source's where the file system allows it, else copies.

    Raises:
        ValueError, OSError: the source cannot be exported, and why. Nothing is written then.
    """
    target = new_folder(out)
    folder = checkpoint.fetch(source, weights=not config_only)
    files = ["config.json", "generation_config.json", *([] if config_only else checkpoint.TOKENIZER_FILES)]
    for file in ["README.md", *files]:
        checkpoint.checked_path(folder, file)
    model = checked_model(folder)
    checkpoint.read_generation_config(folder, model)
    if not config_only:
        if (folder / "tokenizer_config.json").is_file():
            checkpoint.read_json(folder / "tokenizer_config.json")
        weights, unexpected = checkpoint.checked_weights(folder, model)
        if unexpected:
            raise ValueError(
                f"The weights in {folder} hold {checkpoint.summary_of(unexpected)} that the model in its config.json "
                "does not have: one of the files is of another model."
            )
        files += weights
    with written_whole(target) as made:
        for file in files:
            if (folder / file).is_file():
                _link_or_copy(folder / file, made / file)
        add_code(made, model.config)
        origin = None if os.path.isdir(source) else str(source)
        card = make_card(model.config, name or target.resolve().name, origin, card_header(folder))
        (made / "README.md").write_text(card, encoding="utf-8")
    return target


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, whose files are moved to `target` at the end: nothing is there until then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-") as temporary:
        made = Path(temporary) / "repository"
        made.mkdir()
        yield made
        if target.exists():
            for path in made.iterdir():
                path.rename(target / path.name)
        else:
            made.rename(target)


def add_code(folder: Path, config: PreTrainedConfig) -> None:
    """Write the code of a configuration's family into a saved folder, and the names of its classes into the folder's
    configurations (`auto_map`)."""
    config_class, model, causal_lm, tokenizer = family(config)
    classes = {"AutoConfig": config_class, "AutoModel": model, "AutoModelForCausalLM": causal_lm}
    own_tokenizer = tokenizer.__module__.split(".")[0] == __name__.split(".")[0]
    for name, text in bundle(*classes.values(), *([tokenizer] if own_tokenizer else [])).items():
        (folder / name).write_text(text, encoding="utf-8")
    reference = lambda cls: f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
    values = checkpoint.read_json(folder / "config.json")
    values["auto_map"] = {auto: reference(cls) for auto, cls in classes.items()}
    values["architectures"] = [causal_lm.__name__]
    path = folder / "tokenizer_config.json"
    settings = checkpoint.read_json(path) if path.is_file() else {}
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
        name: of the repository, which the card's example loads; the name of the folder `out` if not given.
    """
    target = new_folder(out)
    texts = bundle(generate)
    # transformers calls `generate` of a file of this name.
    texts["generate.py"] = texts.pop("generation_custom_generate.py")
    (target / "custom_generate").mkdir(parents=True)
    for file, text in texts.items():
        (target / "custom_generate" / file).write_text(text, encoding="utf-8")
    (target / "README.md").write_text(make_loop_card(name or target.resolve().name), encoding="utf-8")
    return target


def new_folder(out: str | os.PathLike) -> Path:
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a folder that does not exist, or an empty one.")
    return folder


def checked_model(folder: Path) -> PreTrainedModel:
    """The model that `config.json` describes, without weights."""
    path = folder / "config.json"
    values = checkpoint.read_json(path)
    try:
        lines = lines_of(values.get("model_type", ""))
    except ValueError as error:
        hint = stranger(values.get("model_type", ""), values.get("auto_map"))
        raise ValueError(f"{path}: {str(error).removesuffix('.')}{hint}") from error
    known = [each.__name__ for line in lines for each in line[1:3]]
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"{path} says `architectures={architectures!r}`: it must be a list of names.")
    for name in architectures:
        if name not in known:
            raise ValueError(
                f"{path} asks for `{name}`, which dllm_hf does not have: it has "
                f"{' and '.join(line[2].__name__ for line in lines)} for `model_type={values['model_type']!r}`."
            )
    if values.get("quantization_config") is not None:
        raise ValueError(
            f"{path} has a `quantization_config`: export the weights before quantisation, and quantise them on loading."
        )
    return checkpoint.empty_model(folder)


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # files in the Hub's cache are links
    if target.suffix == ".safetensors":  # the other files are written over: a link would change the source
        with contextlib.suppress(OSError):  # another file system
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
