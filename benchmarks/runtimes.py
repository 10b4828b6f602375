"""A denoising step in ONNX Runtime, ExecuTorch and llama.cpp beside the model's own forward pass, on a CPU.

usage: runtimes.py [--size 38M|124M] [--only onnxruntime executorch llama-cpp-python] [--threads 1] [--repeats 30]
                   [--columns 256] [--block 32]
A Dream of about 38M or 124M parameters (random). Each backend of the loop computes the same step, the last block of a cache that
is filled (of the policies `dual` and `prefix`); the backends alternate. Prints the median CPU time of the step, that of the
runtime's bare call inside it, the ratio to eager, the size on disk and its ratio, and how far the logits are from eager's.
Floors of the machine, in float32: `arithmetic`, the step's matrix products at the speed of a product of 1,024 by 1,024;
`reading`, its weights read once.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import torch

from dllm_hf import DreamConfig, DreamModel
from dllm_hf.edge import DiffusionEdge, export_model
from dllm_hf.generation.window import Frame, make_list, make_window
from dllm_hf.runtimes.gguf_export import export_gguf
from dllm_hf.runtimes.llama_cpp import LlamaCppModel, bindings
from dllm_hf.runtimes.onnx_export import export_onnx
from dllm_hf.runtimes.onnx_runtime import OnnxModel

SIZES = {
    "38M": {"vocab_size": 12288, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    # A fifth of it is the embedding, and a fifth the head.
    "124M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "num_key_value_heads": 4},
}


def build_model(size: str) -> DreamModel:
    torch.manual_seed(0)
    sizes = SIZES[size]
    mask, end = sizes["vocab_size"] - 1, sizes["vocab_size"] - 2
    special = {"mask_token_id": mask, "pad_token_id": end, "eos_token_id": end, "bos_token_id": end}
    return DreamModel(DreamConfig(**sizes, **special, max_position_embeddings=2048)).eval()


class Timed:
    """A runtime's session or method, whose call notes the CPU time that it took."""

    def __init__(self, bare, clock: dict[str, float]):
        self.bare, self.clock = bare, clock

    def __getattr__(self, name):
        def call(*args):
            begin = time.process_time()
            outputs = getattr(self.bare, name)(*args)
            self.clock["seconds"] = time.process_time() - begin
            return outputs

        return call


def with_onnxruntime(model: DreamModel, folder: Path, args: argparse.Namespace):
    """`(name, model, clock, megabytes)` of each export."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a thread that waits takes CPU time
    for quantization in (None, "int8"):
        name, clock = f"ONNX Runtime {quantization or 'fp32'}", {}
        path = export_onnx(model, folder / name, quantization)
        exported = OnnxModel.from_pretrained(path, options)
        exported.session = Timed(exported.session, clock)
        yield name, exported, clock, sum(file.stat().st_size for file in path.glob("model.onnx*")) / 1e6


def with_executorch(model: DreamModel, folder: Path, args: argparse.Namespace):
    """`(name, model, clock, megabytes)` of each export."""
    inputs = (torch.zeros(1, args.columns, dtype=torch.long),)
    for quantization in (None, "fp16", "int8", "int4"):
        name, clock = f"ExecuTorch {quantization or 'fp32'}", {}
        path = export_model(model, inputs, folder / name, quantization, block_length=args.block)
        exported = DiffusionEdge.from_pretrained(path, args.threads)
        exported.methods = {each: Timed(method, clock) for each, method in exported.methods.items()}
        yield name, exported, clock, path.stat().st_size / 1e6


def with_llama_cpp(model: DreamModel, folder: Path, args: argparse.Namespace):
    """`(name, model, clock, megabytes)` of each export."""
    llama, clock = bindings(), {}
    llama.llama_decode = Timed(SimpleNamespace(decode=llama.llama_decode), clock).decode
    for type in ("f32", "f16", "q8_0", "q4_k_m"):
        path = export_gguf(model, folder / type, type)
        exported = LlamaCppModel.from_pretrained(path, args.threads)
        yield f"llama.cpp {type.upper()}", exported, clock, (path / "model.gguf").stat().st_size / 1e6


RUNTIMES = {"onnxruntime": with_onnxruntime, "executorch": with_executorch, "llama-cpp-python": with_llama_cpp}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", 1), ("repeats", 30), ("columns", 256), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--size", choices=SIZES, default="38M")
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = build_model(args.size)
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", *args.only)]
    print(f"{platform.processor() or platform.machine()}, {args.threads} thread(s), {', '.join(versions)};", end=" ")
    print(f"Dream of {millions:.0f}M: a step of {args.block} tokens over {args.columns} columns")
    models, clocks, megabytes = {"eager fp32": model}, {}, {"eager fp32": 4 * millions}
    with tempfile.TemporaryDirectory() as folder:
        for runtime in args.only:
            for name, *found in RUNTIMES[runtime](model, Path(folder), args):
                models[name], clocks[name], megabytes[name] = found
        measure(args, models, clocks, megabytes)
    for name, milliseconds in floors(model, args.block).items():
        print(f"{name:18} {milliseconds:6.1f} ms")


def floors(model: DreamModel, tokens: int) -> dict[str, float]:
    weights = sum(each.numel() for each in model.parameters()) - model.model.embed_tokens.weight.numel()
    square, flat = torch.randn(1024, 1024), torch.randn(weights)

    def milliseconds(run) -> float:
        times = []
        for _ in range(11):
            begin = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - begin))
        return statistics.median(times)

    operations = weights * tokens / 1024**3
    return {"arithmetic": operations * milliseconds(lambda: square @ square), "reading": milliseconds(flat.sum)}


def measure(args: argparse.Namespace, models: dict, clocks: dict, megabytes: dict[str, float]) -> None:
    columns, first = args.columns, args.columns - args.block
    frames = [Frame(0, columns, 0, 0, columns, columns, 0, 0)]
    frames += [Frame(first - 1, columns, first, columns, columns, columns, first, 0)]
    tokens = torch.randint(0, 12000, (columns,))
    steps, logits = {}, {}
    for name, model in models.items():
        backend = model.make_backend(True)
        state, make = backend.open(1, columns + 1), make_list if backend.takes_lists else make_window
        whole, step = (make([frame], [0], 1, columns, shift=1) for frame in frames)
        backend(tokens[whole.columns], whole, state)
        steps[name] = partial(backend, tokens[step.columns], step, state)
        logits[name] = steps[name]()
    seconds, bare = defaultdict(list), defaultdict(list)
    for _ in range(args.repeats):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
            if name in clocks:
                bare[name].append(clocks[name]["seconds"])
    reference = logits["eager fp32"]
    eager = statistics.median(seconds["eager fp32"])
    for name, times in seconds.items():
        took = statistics.median(times)
        error = (logits[name] - reference).square().mean().sqrt() / reference.std()
        inside = f", {1e3 * statistics.median(bare[name]):.1f} in the bare call" if bare[name] else ""
        print(f"{name:18} {1e3 * took:6.1f} ms, {took / eager:.2f} of eager{inside};", end=" ")
        size = megabytes[name] / megabytes["eager fp32"]
        print(f"{megabytes[name]:.0f} MB, {size:.3f}; rms of the error / std of the logits {error:.1e}")


if __name__ == "__main__":
    main()
