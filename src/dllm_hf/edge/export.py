"""Models exported to ExecuTorch, as files that `runtimes/executorch_runtime.py` and C++ programs read. docs/edge.md."""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, export
from torch.fx.passes.infra.pass_base import PassResult
from transformers import AttentionInterface
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..hub.checkpoint import TOKENIZER_FILES
from ..runtimes.executorch_runtime import EXTRA, FORMAT, PROGRAM_NAME
from ..runtimes.exported import package
from ..runtimes.exporting import check_exportable, describe, new_folder
from .model import DreamEdge, StaticCache

QUANTIZATIONS = (None, "fp16", "int8", "int4")
REFUSED = {
    "gla_dream": "its cache holds recurrent states, and the program keeps keys and values",
    "experts": "ExecuTorch has no operator for its experts (`grouped_mm`)",
}
GROUP = 32  # weights that share a scale in 4 bits; docs/edge.md has what others give
MASKED = -1e4  # added to the score of a column that is not seen: 0 after the softmax, and a number in float16 as well


def export_model(
    model: Any,
    example_inputs: tuple[torch.Tensor, ...],
    output_path: str | os.PathLike,
    quantization: str | None = None,
    block_length: int | None = None,
) -> Path:
    """Write a model as one `.pte` file that decodes with all policies, with configurations and tokenizer beside it.

    The file has two methods, `prefill` for windows of any length and `step` for a block, which share weights and cache, see
    [`Program`], and the numbers of `runtimes.executorch_runtime` as constant methods.

    Args:
        model: LLaDA, Dream or SDAR, in float32; a [`DreamEdge`] or the model itself. It is copied, not changed.
        example_inputs: `(input_ids,)`, whose shape is the most rows and columns, prompt and new tokens, that the file takes.
        output_path: a file whose name ends in `.pte`, or a folder that does not exist, which gets a file `model.pte`.
        quantization: None leaves the weights in float32; `"fp16"`, `"int8"`, `"int4"`. The last two quantise what weights are
            multiplied with in each pass, for each token; `"int4"` has a scale for each 32 weights of the layers, and 8 bits
            in embedding and head.
        block_length: the longest block. By default the model's own, or 32.

    Returns:
        The path of the `.pte` file.

    Raises:
        ValueError: the model cannot be exported, and why. Whatever fails, nothing is left at `output_path`.
    """
    model = model.model if isinstance(model, DreamEdge) else model
    target = Path(output_path)
    rows, columns = _check(model, example_inputs, target, quantization)
    block = min(block_length or model.default_block_length or 32, columns)
    if block < 1:
        raise ValueError(f"`block_length={block_length}` must be at least 1.")
    with _place(target) as folder:
        name = target.name if target.suffix == ".pte" else PROGRAM_NAME
        limits = {"max_rows": rows, "max_columns": columns, "max_block_length": block}
        limits["step_window"] = min(block + model.logits_shift, columns)
        (folder / name).write_bytes(_lowered(_quantized(model, quantization), quantization, limits))
        describe(model, folder, FORMAT._replace(files=(name,)), quantization=quantization, **limits)
    return target if target.suffix == ".pte" else target / name


def _check(model: Any, example_inputs: Any, target: Path, quantization: str | None) -> tuple[int, int]:
    """The rows and columns of the program."""
    check_exportable(model, target, "ExecuTorch", REFUSED)
    siblings = (FORMAT.description, CONFIG_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_FILES)
    if target.suffix == ".pte" and (there := [each for each in siblings if os.path.lexists(target.parent / each)]):
        raise ValueError(f"{target.parent} holds {', '.join(there)} already: give `output_path` a folder of its own.")
    if model.dtype != torch.float32 or any(each.dtype != torch.float32 for each in model.parameters()):
        raise ValueError(
            f"The model is {model.dtype}: load it with `dtype=torch.float32`, and say `quantization='fp16'`."
        )
    if quantization not in QUANTIZATIONS:
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"`quantization={quantization!r}` is not possible: choose one of {known}.")
    if not (isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1 and example_inputs[0].ndim == 2):
        raise ValueError("`example_inputs` must be `(input_ids,)`, with `input_ids` of the shape `(rows, columns)`.")
    rows, columns = example_inputs[0].shape
    if not 4 <= columns <= model.config.max_position_embeddings:
        raise ValueError(
            f"`example_inputs` has {columns} columns: give at least 4, and at most the model's "
            f"{model.config.max_position_embeddings} positions."
        )
    package("executorch.exir", EXTRA)
    if quantization in ("int8", "int4"):
        package("torchao", EXTRA)
    return rows, columns


@contextmanager
def _place(target: Path) -> Iterator[Path]:
    """A folder to fill, whose files stand at `target` in the end, or, if that is a file, beside it."""
    if target.suffix != ".pte":
        with new_folder(target) as (folder, _):
            yield folder
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        yield Path(temporary)
        written: list[Path] = []
        try:
            for name in sorted(os.listdir(temporary)):
                written.append(target.parent / name)
                Path(temporary, name).rename(target.parent / name)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise


class Norm(nn.Module):
    """The library's RMS norm, whose mean is a product: XNNPACK has no mean over the last axis alone, and each operation that
    it lacks ends a part of the program that it runs."""

    mean: torch.Tensor

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon
        self.register_buffer("mean", torch.full((len(norm.weight), 1), 1 / len(norm.weight)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        numbers = hidden.float()
        return self.weight * (numbers * torch.rsqrt(numbers.square() @ self.mean + self.epsilon)).to(hidden.dtype)


def edge_attention(module, query, key, value, attention_mask, scaling, **kwargs) -> tuple[torch.Tensor, None]:
    """Attention in operations that XNNPACK has. Keys and values are not repeated for the heads that share them.

    Args:
        query: `(rows, heads, window, head_dim)`.
        key, value: `(rows, kv_heads, columns, head_dim)`.
        attention_mask: `(rows, 1, window, columns)`, added to the scores.
    """
    rows, heads, window, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # Heads and window are split in the order that needs no assumption about the length of the window.
    queries = (query * scaling).contiguous().view(rows, kv_heads, group * window, dim)
    scores = (queries @ key.transpose(2, 3)).view(rows, kv_heads, group, window, -1) + attention_mask[:, :, None]
    weights = scores.softmax(-1).view(rows, kv_heads, group * window, -1)
    attended = (weights @ value).view(rows, kv_heads, group, window, dim).flatten(1, 2)
    return attended.transpose(1, 2), None


AttentionInterface.register("edge", edge_attention)


class Program(nn.Module):
    """What is exported, twice: a forward pass over a window, with keys and values in buffers.

    Args:
        columns: of the buffers: the most that a text may have, and the scratch column.
    """

    keys_0: torch.Tensor

    def __init__(self, model: Any, rows: int, columns: int):
        super().__init__()
        self.model, self.layers = model, len(model.model.layers)
        cache = StaticCache.for_model(model, rows, columns)
        for kind, tensors in (("keys", cache.keys), ("values", cache.values)):
            for layer, tensor in enumerate(tensors):
                self.register_buffer(f"{kind}_{layer}", tensor, persistent=False)

    def forward(
        self, tokens: torch.Tensor, columns: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            tokens, columns, lengths: `(rows, window)` int64: token ids, the columns that their keys and values are written
                to, which are their positions, and how many columns, from 0 on, each token sees.
            keep: `(rows, block)` int64, indices into the window.

        Returns:
            `(rows, block, vocab)` float32, the logits at `keep`.
        """
        buffers = ([getattr(self, f"{kind}_{i}") for i in range(self.layers)] for kind in ("keys", "values"))
        cache = StaticCache(*buffers)
        cache.columns = columns
        seen = torch.arange(self.keys_0.shape[2]) < lengths[..., None]
        mask = torch.where(seen, 0.0, MASKED)[:, None].to(self.model.dtype)
        inputs = {"attention_mask": mask, "position_ids": columns, "past_key_values": cache, "logits_to_keep": keep}
        return self.model(input_ids=tokens, use_cache=True, **inputs).logits.float()


def _quantized(model: Any, quantization: str | None) -> Any:
    """A copy of the model with weights of the precision that was asked for, in modules that can be exported."""
    model = copy.deepcopy(model).eval()
    model.config._attn_implementation = "edge"
    if getattr(model.config, "has_identity_norms", False):
        model.drop_identity_norms()  # float16 has no numbers as small as projections before such norms
    if quantization == "fp16":
        model.half()
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, Norm(module))
    if quantization in ("int8", "int4"):
        api, granularity = package("torchao.quantization", EXTRA), package("torchao.quantization.granularity", EXTRA)
        is_group = lambda module, name: (
            quantization == "int4"
            and isinstance(module, nn.Linear)
            and ".layers." in name
            and module.in_features % GROUP == 0
        )
        for bits, size, chosen in (
            (torch.int4, granularity.PerGroup(GROUP), is_group),  # type: ignore[attr-defined]  # a dtype of torch all the same
            (
                torch.int8,
                granularity.PerAxis(0),
                lambda module, name: isinstance(module, nn.Linear) and not is_group(module, name),
            ),
        ):
            how = api.Int8DynamicActivationIntxWeightConfig(weight_dtype=bits, weight_granularity=size)
            api.quantize_(model, how, chosen)
        how = api.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=granularity.PerAxis(0))
        api.quantize_(model, how, lambda module, name: isinstance(module, nn.Embedding))
    return model


@torch.no_grad()
def _lowered(model: Any, quantization: str | None, limits: dict[str, int]) -> bytes:
    """The contents of the file."""
    exir, passes = package("executorch.exir", EXTRA), package("executorch.exir.passes", EXTRA)
    xnnpack = package("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA)
    package("executorch.kernels.quantized", EXTRA)  # registers the operators of a quantised embedding
    is_quantized = quantization in ("int8", "int4")
    rows, block = limits["max_rows"], limits["max_block_length"]
    program = Program(model, rows, limits["max_columns"] + 1)
    window = {1: Dim("window", min=2, max=limits["max_columns"])}
    sizes = {"prefill": (3, (window, window, window, None)), "step": (limits["step_window"], None)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods = {}
        for name, (length, dynamic) in sizes.items():
            # A tensor for each: the exporter reads one that is passed twice as one input.
            inputs = [torch.arange(length).repeat(rows, 1) for _ in range(3)] + [torch.zeros(rows, block).long()]
            methods[name] = export(program, tuple(inputs), dynamic_shapes=dynamic, strict=False)
        partitioners = [xnnpack.XnnpackDynamicallyQuantizedPartitioner()] if is_quantized else []
        lowered = exir.to_edge_transform_and_lower(
            methods,
            transform_passes=[_infer_sizes],
            partitioner=[*partitioners, xnnpack.XnnpackPartitioner()],
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={**limits, **_constants(model)},
        )
        config = exir.ExecutorchBackendConfig(
            # Without it each method has a cache of its own, and what `prefill` wrote is not there for `step`.
            memory_planning_pass=passes.MemoryPlanningPass(share_mutable_buffers=True, alloc_graph_input=False),
            do_quant_fusion_and_const_prop=is_quantized,
        )
        return lowered.to_executorch(config).buffer


def _infer_sizes(graph: torch.fx.GraphModule) -> Any:
    """A pass: where a view has one size that depends on the window, -1 in its place. XNNPACK has only such views."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and "view_copy" in str(node.target):
            sizes = list(node.args[1])
            symbols = [index for index, size in enumerate(sizes) if not isinstance(size, int)]
            if len(symbols) == 1 and -1 not in sizes:
                sizes[symbols[0]] = -1
                node.args = (node.args[0], sizes)
    graph.recompile()
    return PassResult(graph, True)


def _constants(model: Any) -> dict[str, int]:
    """What a program without Python needs to know, beside the limits."""
    config = model.config
    constants = {"vocab_size": config.vocab_size, "logits_shift": model.logits_shift}
    constants |= {"sees_earlier_blocks": int(model.sees_earlier_blocks)}
    return constants | {"mask_token_id": -1 if config.mask_token_id is None else config.mask_token_id}
