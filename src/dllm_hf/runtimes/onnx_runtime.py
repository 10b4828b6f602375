"""ONNX Runtime: decoding with a model that `onnx_export.py` has exported. docs/backends.md."""

import os
from pathlib import Path
from typing import Any

import torch

from ..generation.backend import ModelBackend
from ..generation.cache import CanvasCache
from ..generation.window import Window
from .exported import ExportedModel, Format, package, read_description

MODEL_NAME, WEIGHTS_NAME = "model.onnx", "model.onnx.data"
FORMAT = Format("dllm_hf_onnx.json", 2, (MODEL_NAME, WEIGHTS_NAME), "dllm_hf.runtimes.onnx_export.export_onnx")
EXTRA = "onnxruntime"


class OnnxModel(ExportedModel):
    """An exported model, decoded like the one that it was exported from. [`OnnxModel.from_pretrained`] makes it.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        cache_shape: `(kv_heads, head_dim)`. cache_names: the graph's inputs for keys and values, layer by layer.
    """

    def __init__(self, session: Any, folder: Path, description: dict[str, Any]):
        super().__init__(folder, description, description["sha256"][WEIGHTS_NAME])
        self.session = session
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
        runtime, folder = package("onnxruntime", EXTRA), Path(folder)
        description = read_description(folder, FORMAT)
        session = runtime.InferenceSession(folder / MODEL_NAME, session_options, providers=["CPUExecutionProvider"])
        return cls(session, folder, description)

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
