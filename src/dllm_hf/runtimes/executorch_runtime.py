"""ExecuTorch: decoding with a file that `edge/export.py` has written. docs/edge.md.

The methods of a file take `(tokens, columns, lengths, keep)`, see [`edge.export.Program`]; a window that is shorter repeats its
last column. All rows of the file are computed in each pass: those that take no part write to the scratch column.
"""

import os
import weakref
from pathlib import Path
from typing import Any

import torch

from ..generation.backend import ModelBackend
from ..generation.cache import CanvasCache, Copy
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.window import Window
from .exported import ExportedModel, Format, package, read_description

PROGRAM_NAME = "model.pte"
FORMAT = Format("dllm_hf_edge.json", 1, (PROGRAM_NAME,), "dllm_hf.edge.export_model")
EXTRA = "edge"
DELEGATE = "XnnpackBackend"
OPERATORS = "executorch.kernels.quantized"  # of a quantised embedding


class DiffusionEdge(ExportedModel):
    """An exported model, decoded like the one that it was exported from. [`DiffusionEdge.from_pretrained`] makes it.

    A file has one cache: one call decodes at a time.

    Attributes:
        max_rows, max_columns, max_block_length: what the file takes. step_window: the window of its method `step`.
    """

    def __init__(self, program: Any, folder: Path, description: dict[str, Any], fingerprint: str):
        super().__init__(folder, description, fingerprint)
        self.max_rows, self.max_columns = description["max_rows"], description["max_columns"]
        self.max_block_length, self.step_window = description["max_block_length"], description["step_window"]
        self.methods = {name: program.load_method(name) for name in ("prefill", "step")}
        self.owner: weakref.ref | None = None  # of the call that wrote the cache last

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, num_threads: int | None = None) -> "DiffusionEdge":
        """Read a file that [`export_model`] wrote.

        Args:
            path: the file, or its folder.
            num_threads: of the process's ExecuTorch; by default a thread for each core.

        Raises:
            ValueError: names the file that is missing, cut short, or of another version or family, or the part of the
                runtime that is not there.
        """
        runtime = package("executorch.runtime", EXTRA).Runtime.get()
        path = Path(path)
        folder = path.parent if path.suffix == ".pte" else path
        description = read_description(folder, FORMAT)
        (name, fingerprint), *_ = description["sha256"].items()
        if path.suffix == ".pte" and path.name != name:
            raise ValueError(
                f"{folder} was exported with {name}, and {path.name} was asked for: move each to its folder."
            )
        if not runtime.backend_registry.is_available(DELEGATE):
            raise ValueError(
                f"{path} needs the delegate {DELEGATE}, which this build of ExecuTorch lacks: "
                f'`pip install "dllm-hf[{EXTRA}]"`, or build it with `-DEXECUTORCH_BUILD_XNNPACK=ON`.'
            )
        if description["quantization"] in ("int8", "int4"):
            package(OPERATORS, EXTRA)
        if num_threads is not None:
            package("executorch.extension.pybindings.portable_lib", EXTRA)._unsafe_reset_threadpool(num_threads)
        return cls(runtime.load_program(folder / name), folder, description, fingerprint)

    def resolve_options(self, generation_config, kwargs: dict[str, Any]) -> DiffusionGenerationConfig:
        config = super().resolve_options(generation_config, kwargs)
        self.check_block(config.block_length or 0)
        return config

    def check_block(self, length: int) -> None:
        if length > self.max_block_length:
            raise ValueError(
                f"A block of {length} positions is longer than the {self.max_block_length} of the file: pass "
                f"`block_length={self.max_block_length}` or less, or export it with a longer one."
            )

    def make_backend(self, has_cache: bool, **options: Any) -> "EdgeBackend":
        return EdgeBackend(self, has_cache, **options)

    def make_cache(self, width: int) -> "EdgeCache":
        return EdgeCache(self, width)


class EdgeCache(CanvasCache):
    """What a call knows of the file's cache: which tokens it belongs to. Keys and values are in the program's memory."""

    def share(self, copies: list[Copy]) -> list[int]:
        """Nothing is copied: only the program reaches its memory."""
        return [0] * len(copies)


class EdgeBackend(ModelBackend):
    """The backend of a file. The arguments are those of [`ModelBackend`], but every slot has the columns of the file, whatever
    `arena_columns` says."""

    model: DiffusionEdge
    takes_drafts = False

    def open(self, slots: int, width: int) -> EdgeCache:
        """`width`: with the scratch column."""
        model, rows = self.model, slots * self.guidance_copies
        if rows > model.max_rows:
            raise ValueError(
                f"{rows} rows do not fit into the {model.max_rows} of the file"
                f"{' (guidance takes two for each)' if self.guidance_copies > 1 else ''}: decode fewer at a time, or "
                "export it with a larger batch."
            )
        if width - 1 > model.max_columns:
            raise ValueError(
                f"A canvas of {width - 1} columns does not fit into the {model.max_columns} of the file: shorten the "
                "prompt, ask for fewer `max_new_tokens`, or export it with more columns."
            )
        cache = model.make_cache(width)
        cache.reserve(rows)
        model.owner = weakref.ref(cache)
        return cache

    def _forward(self, tokens: torch.Tensor, window: Window, state: CanvasCache | None) -> torch.Tensor:
        model, (rows, block) = self.model, window.keep.shape
        model.check_block(block)
        if model.owner is None or model.owner() is not state:
            raise ValueError(
                "Another call has decoded with this file since, and its cache holds that one's text: start anew, or load "
                "the file twice with `DiffusionEdge.from_pretrained`."
            )
        width = tokens.shape[1]
        # Half a window or less is faster in the method whose window has any length.
        is_step = model.step_window // 2 < width <= model.step_window
        padding = model.step_window - width if is_step else 0
        feeds = []
        for each, filler, more in (
            (tokens, 0, padding),
            (window.columns, model.max_columns, padding),
            (window.lengths.long(), 1, padding),
            (window.keep if block else window.keep.new_zeros(rows, 1), 0, model.max_block_length - max(block, 1)),
        ):
            full = each.new_full((model.max_rows, each.shape[1] + more), filler)
            full[window.slots, : each.shape[1]] = each
            full[window.slots, each.shape[1] :] = each[:, -1:]
            feeds.append(full)
        (logits,) = model.methods["step" if is_step else "prefill"].execute(feeds)
        return logits[window.slots, :block]
