"""What exported models share: a folder with a description of its program, and the model as decoding sees it. What writes such
folders shares `exporting.py`.

Nothing here needs the code of a model, so that decoding with an exported one does not either.
"""

import hashlib
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..generation.configuration import DiffusionGenerationConfig
from ..generation.mixin import DiffusionGenerationMixin

FAMILIES = ("llada", "Dream", "sdar")  # `model_type` of those whose cache holds keys and values alone
# What decoding asks of a model, see [`generation.contract.DenoisingModel`], and of its configuration.
CONTRACT = ["logits_shift", "block_grid", "sees_earlier_blocks", "confidence_source", "cache_policies"]
CONTRACT += ["default_remasking_strategy"]
CONFIG = ["vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
CONFIG += ["mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "eot_token_id"]


# The description of an exported folder -> module and class that read it.
RUNTIMES = {
    "dllm_hf_onnx.json": (".onnx_runtime", "OnnxModel"),
    "dllm_hf_gguf.json": (".llama_cpp", "LlamaCppModel"),
    "dllm_hf_edge.json": (".executorch_runtime", "DiffusionEdge"),
}


class Format(NamedTuple):
    """A kind of exported folder.

    description: the name of the JSON file that says what was exported. version: of the folder's contents.
    files: names of the program's files, of which the description holds hashes.
    exporter: the function that writes it, for messages.
    """

    description: str
    version: int
    files: tuple[str, ...]
    exporter: str


def package(name: str, extra: str) -> Any:
    """An optional package. `extra`: of pyproject.toml, which installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f'`{name}` cannot be imported: `pip install "dllm-hf[{extra}]"`. {error}') from error


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def read_description(folder: Path, form: Format) -> dict[str, Any]:
    """The description of an exported folder. Raises a `ValueError` that names the file that is missing, cut short, or of
    another version or family."""
    again = f"export the model again with `{form.exporter}`"

    def check_files(*names: str) -> None:
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}: {again}.")

    check_files(form.description, CONFIG_NAME, GENERATION_CONFIG_NAME)
    contents = {}
    for name in (form.description, CONFIG_NAME):
        try:
            contents[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / name} cannot be read: {again}. {error}") from error
    description, config = contents[form.description], contents[CONFIG_NAME]
    if (version := description.get("format")) != form.version:
        raise ValueError(f"{folder} has the format {version}, and this version reads {form.version}: {again}.")
    check_files(*description["sha256"])
    for name, wanted in description["sha256"].items():
        if hash_of(folder / name) != wanted:
            raise ValueError(f"{folder / name} is cut short, or not the file that was exported: {again}.")
    if description["family"] not in FAMILIES:
        raise ValueError(
            f"`model_type={description['family']!r}` is none of the families that can be exported ({', '.join(FAMILIES)})."
        )
    if config.get("model_type") != description["family"]:
        raise ValueError(
            f"{folder / CONFIG_NAME} is of `model_type={config.get('model_type')!r}`, but the program in it of "
            f"{description['family']!r}: {again}."
        )
    return description


class ExportedModel(DiffusionGenerationMixin):
    """An exported model, decoded like the one that it was exported from. Subclasses make its backend.

    Args:
        folder: from which its generation configuration is read.
        description: see [`read_description`].
        fingerprint: a hash of its weights.

    Attributes:
        family: its `model_type`.
        takes_devices: whether `from_pretrained` takes `devices`, a number of GPUs.
    """

    takes_devices = False
    cache_dtypes = ()

    def __init__(self, folder: Path, description: dict[str, Any], fingerprint: str):
        super().__init__()
        self.config, self.family = PreTrainedConfig(**description["config"]), description["family"]
        self.generation_config = DiffusionGenerationConfig.from_pretrained(folder)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        for name in CONTRACT:
            setattr(self, name, description[name])
        self._default_block_length = description["default_block_length"]
        # Tells models of one configuration apart: the identity of a cache is made of configuration and parameters.
        values = torch.tensor(list(bytes.fromhex(fingerprint)[:8]), dtype=self.dtype)
        self.fingerprint = nn.Parameter(values, requires_grad=False)

    @property
    def default_block_length(self) -> int | None:
        return self._default_block_length


def load_exported(folder: str | os.PathLike, devices: int = 0) -> Any:
    """An exported model, by the runtime that its folder is for.

    Args:
        devices: the number of GPUs; 0 is the CPU.

    Raises:
        ValueError: the folder holds no exported model, or its runtime no such devices.
    """
    found = next((RUNTIMES[name] for name in RUNTIMES if Path(folder, name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} is no exported model: it has none of {', '.join(RUNTIMES)}. See docs/backends.md.")
    module, name = found
    runtime = getattr(import_module(module, __package__), name)
    if devices and not runtime.takes_devices:
        raise ValueError(f"{name} computes on the CPU alone, so that {devices} GPUs are of no use: leave them out.")
    return runtime.from_pretrained(folder, **({"devices": devices} if devices else {}))
