"""Models exported to ONNX, as folders that `onnx_runtime.py` reads. docs/backends.md."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..generation.evaluation_mode import evaluating
from .exported import package
from .exporting import check_exportable, describe, new_folder
from .onnx_runtime import EXTRA, FORMAT, MODEL_NAME

REFUSED = {
    "gla_dream": "its cache holds recurrent states, and the graph reads and writes keys and values",
    "experts": "PyTorch's exporter has no ONNX operator for its experts (`grouped_mm`)",
}


class WindowCache:
    """Stands for the cache while the graph is exported: gives the layers the canvas with the window's columns replaced, and
    keeps the window's keys and values.

    past: keys and values of each layer, `(rows, kv_heads, columns, head_dim)`. columns: `(rows, window)`.
    """

    is_compileable = True

    def __init__(self, past: list[torch.Tensor], columns: torch.Tensor):
        self.past, self.columns = past, columns
        self.written: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        self.written += [keys, values]
        index = self.columns[:, None, :, None].expand_as(keys)
        past_keys, past_values = self.past[2 * layer : 2 * layer + 2]
        return past_keys.scatter(2, index, keys), past_values.scatter(2, index, values)

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class WindowForward(nn.Module):
    """What is exported: a forward pass over a window, with keys and values as arguments and those of the window as results."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens, columns, lengths, keep, past):
        cache = WindowCache(past, columns)
        visible = torch.arange(past[0].shape[2], dtype=torch.int32, device=tokens.device)
        logits = self.model(
            input_ids=tokens,
            attention_mask=(visible < lengths[..., None])[:, None],
            position_ids=columns,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits, *cache.written


def export_onnx(model: Any, out: str | os.PathLike, quantization: str | None = None) -> Path:
    """Write a model as a folder that [`OnnxModel`] reads: the graph and its weights, configurations, tokenizer.

    Args:
        model: LLaDA, Dream or SDAR, in float32.
        out: the folder; it must not exist.
        quantization: None leaves the weights in float32; `"int8"` stores the embedding and the weights of
            matrix products in 8 bits; what those are multiplied with is quantised in each pass.

    Returns:
        `out`.

    Raises:
        ValueError: the model cannot be exported, and why. Whatever fails, `out` does not exist then.
    """
    target = Path(out)
    _check(model, target, quantization)
    with new_folder(target) as (folder, temporary):
        _write_graph(model, folder if quantization is None else temporary)
        if quantization == "int8":
            _quantize(temporary / MODEL_NAME, folder / MODEL_NAME)
        describe(model, folder, FORMAT, quantization=quantization)
    return target


def _quantize(source: Path, target: Path) -> None:
    """Products in 8 bits, of which each multiplies by one scale for all of its inputs, except `down_proj`: its inputs have
    outliers, and get a scale for each run of 128."""
    onnx, quantization = package("onnx", EXTRA), package("onnxruntime.quantization", EXTRA)
    nbits = package("onnxruntime.quantization.matmul_nbits_quantizer", EXTRA)
    excluded = [
        node.name
        for node in onnx.load(source, load_external_data=False).graph.node
        for each in node.metadata_props
        if each.key == "pkg.torch.onnx.name_scopes" and ".down_proj" in each.value
    ]
    first = source.with_name("without_down_proj.onnx")
    quantization.quantize_dynamic(
        source,
        first,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # Gather: the embedding
        nodes_to_exclude=excluded,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )
    how = nbits.DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, accuracy_level=4, bits=8)
    blocks = nbits.MatMulNBitsQuantizer(onnx.load(first), algo_config=how)
    blocks.process()
    blocks.model.save_model_to_file(str(target), use_external_data_format=True)


def _check(model: Any, target: Path, quantization: str | None) -> None:
    check_exportable(model, target, "ONNX", REFUSED)
    if model.dtype != torch.float32:
        raise ValueError(f"The model is {model.dtype}: load it with `dtype=torch.float32` to export it.")
    if quantization not in (None, "int8"):
        raise ValueError(f"`quantization={quantization!r}` is not possible: choose None or 'int8'.")
    for each in ("onnx", "onnxscript", "onnxruntime"):
        package(each, EXTRA)


def _write_graph(model: Any, folder: Path) -> None:
    config, attention = model.config, model.config._attn_implementation
    names = [f"{kind}_{layer}" for layer in range(config.num_hidden_layers) for kind in ("keys", "values")]
    # Two rows and more columns than one: the exporter takes a length of 1 for a constant.
    shape = (2, config.num_key_value_heads, 12, model.model.layers[0].self_attn.head_dim)
    past = [torch.zeros(shape, device=model.device) for _ in names]
    # A tensor for each: the exporter reads one that is passed twice as one input.
    columns, tokens, keep = (torch.arange(size, device=model.device).repeat(2, 1) for size in (5, 5, 3))
    lengths = torch.full_like(columns, 12, dtype=torch.int32)
    token_sizes, past_sizes = {0: "rows", 1: "window"}, {0: "rows", 2: "columns"}
    sizes = (*[token_sizes] * 3, {0: "rows", 1: "block"}, [past_sizes for _ in past])
    graph = WindowForward(model)
    config._attn_implementation = "sdpa"
    try:
        with torch.no_grad(), evaluating(graph.modules()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name: ")  # one name for several inputs is meant
            torch.onnx.export(
                graph,
                (tokens, columns, lengths, keep, past),
                folder / MODEL_NAME,
                input_names=["tokens", "columns", "lengths", "keep", *names],
                output_names=["logits", *(f"window_{name}" for name in names)],
                dynamic_shapes=sizes,
                dynamo=True,
                external_data=True,  # a file of ONNX holds 2 GB at most
                verbose=False,
            )
    finally:
        config._attn_implementation = attention
