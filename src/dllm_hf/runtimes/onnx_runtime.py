"""ONNX Runtime: decoding with a model that `onnx_export.py` has exported. docs/backends.md."""

import hashlib
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..families import family
from ..generation.backend import ModelBackend
from ..generation.cache import CanvasCache
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.window import Window

FORMAT = 1  # of the exported folder
DESCRIPTION_NAME = "dllm_hf_onnx.json"
MODEL_NAME, WEIGHTS_NAME = "model.onnx", "model.onnx.data"
# What decoding asks of a model, see [`generation.contract.DenoisingModel`].
CONTRACT = ["logits_shift", "block_grid", "sees_earlier_blocks", "confidence_source", "cache_policies"]
CONTRACT += ["default_remasking_strategy"]


def package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f'`{name}` cannot be imported: `pip install "dllm-hf[onnxruntime]"`. {error}') from error


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


class OnnxModel(DiffusionGenerationMixin):
    """An exported model, decoded like the one that it was exported from. [`OnnxModel.from_pretrained`] makes it.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        cache_shape: `(kv_heads, head_dim)`. cache_names: the graph's inputs for keys and values, layer by layer.
    """

    def __init__(self, session: Any, config: Any, generation_config: Any, description: dict):
        super().__init__()
        self.session, self.config, self.generation_config = session, config, generation_config
        self.device, self.dtype = torch.device("cpu"), torch.float32
        for name in CONTRACT:
            setattr(self, name, description[name])
        self._default_block_length = description["default_block_length"]
        # Tells models of one configuration apart: the identity of a cache is made of configuration and parameters.
        weights = bytes.fromhex(description["sha256"][WEIGHTS_NAME])
        self.fingerprint = nn.Parameter(torch.tensor(list(weights[:8]), dtype=self.dtype), requires_grad=False)
        past = session.get_inputs()[4:]
        self.cache_names = [each.name for each in past]
        self.cache_shape = past[0].shape[1], past[0].shape[3]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, session_options: Any = None) -> "OnnxModel":
        """Read a folder that [`export_onnx`] wrote.

        Args:
            session_options: `onnxruntime.SessionOptions`, for example with `intra_op_num_threads`.

        Raises:
            ValueError: names the file that is missing, cut short, or of another version or family.
        """
        runtime, folder = package("onnxruntime"), Path(folder)
        again = "export the model again with `dllm_hf.runtimes.onnx_export.export_onnx`"
        for name in (DESCRIPTION_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, MODEL_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}: {again}.")
        try:
            description = json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / DESCRIPTION_NAME} cannot be read: {again}. {error}") from error
        if (version := description.get("format")) != FORMAT:
            raise ValueError(f"{folder} has the format {version}, and this version reads {FORMAT}: {again}.")
        for name, wanted in description["sha256"].items():
            if hash_of(folder / name) != wanted:
                raise ValueError(f"{folder / name} is cut short, or not the file that was exported: {again}.")
        family(description["family"])
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != description["family"]:
            raise ValueError(
                f"{folder / CONFIG_NAME} is of `model_type={config.model_type!r}`, but {MODEL_NAME} of "
                f"{description['family']!r}: {again}."
            )
        generation_config = DiffusionGenerationConfig.from_pretrained(folder)
        session = runtime.InferenceSession(folder / MODEL_NAME, session_options, providers=["CPUExecutionProvider"])
        return cls(session, config, generation_config, description)

    @property
    def default_block_length(self) -> int | None:
        return self._default_block_length

    def make_backend(self, has_cache: bool, **options: Any) -> "OnnxBackend":
        return OnnxBackend(self, has_cache, **options)


class OnnxBackend(ModelBackend):
    """The backend of an exported model. Keys and values stand in a [`CanvasCache`], from which a pass takes the columns that
    its rows see and to which it writes those of the window.

    The arguments are those of [`ModelBackend`].
    """

    model: OnnxModel

    def _forward(self, tokens: torch.Tensor, window: Window, state: CanvasCache | None) -> torch.Tensor:
        rows, block = window.keep.shape
        heads, head_dim = self.model.cache_shape
        empty = torch.zeros(rows, heads, window.visible if state is None else 0, head_dim)
        if state is None:
            past = [empty] * len(self.model.cache_names)
        else:
            state.set_window(window)
            for layer in state.layers:
                if not layer.is_initialized:
                    layer.lazy_initialization(empty, empty)
            past = [each for layer in state.layers for each in layer.read()]
        # A pass that needs no logits computes those of its first position: not every operator takes an empty tensor.
        keep = window.keep if block else torch.zeros(rows, 1, dtype=torch.long)
        inputs = {"tokens": tokens, "columns": window.columns, "lengths": window.lengths, "keep": keep}
        inputs |= dict(zip(self.model.cache_names, past, strict=True))
        feeds = {name: each.contiguous().numpy() for name, each in inputs.items()}
        logits, *written = (torch.from_numpy(each) for each in self.model.session.run(None, feeds))
        for layer, keys, values in zip([] if state is None else state.layers, written[::2], written[1::2]):
            layer.write(keys, values)
        return logits[:, :block]
