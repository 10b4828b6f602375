"""A denoising step in ONNX Runtime and in ExecuTorch beside the model's own forward pass, on a CPU.

usage: runtimes.py [--size 38M|125M] [--only onnxruntime executorch] [--threads 1] [--repeats 30] [--columns 256] [--block 32]
A Dream of about 38M or 125M parameters (random). Each backend of the loop computes the same step, a block in the middle of a cache
that is filled (policy `dual`); the backends alternate. Prints the median CPU time of the step, that of the runtime's bare
call inside it, the ratio to eager, the size on disk, and how far the logits are from eager's.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch

from dllm_hf import DreamConfig, DreamModel
from dllm_hf.edge import DiffusionEdge, export_model
from dllm_hf.generation.window import Frame, make_window
from dllm_hf.runtimes.onnx_export import export_onnx
from dllm_hf.runtimes.onnx_runtime import OnnxModel

SIZES = {
    "38M": {"vocab_size": 12288, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    # A fifth of it is the embedding, and a fifth the head.
    "125M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
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


RUNTIMES = {"onnxruntime": with_onnxruntime, "executorch": with_executorch}


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


def measure(args: argparse.Namespace, models: dict, clocks: dict, megabytes: dict[str, float]) -> None:
    columns, first = args.columns, args.columns // 2
    frames = [Frame(0, columns, 0, 0, columns, columns, 0, 0)]
    frames += [Frame(first - 1, first + args.block, first, first + args.block, columns, columns, first, 0)]
    whole, step = (make_window([frame], [0], 1, columns, shift=1) for frame in frames)
    tokens = torch.randint(0, 12000, (1, columns))
    backends = {name: model.make_backend(True) for name, model in models.items()}
    states = {name: backend.open(1, columns + 1) for name, backend in backends.items()}
    logits = {}
    for name, backend in backends.items():
        backend(tokens, whole, states[name])
        logits[name] = backend(tokens[:, step.columns[0]], step, states[name])
    seconds, bare = defaultdict(list), defaultdict(list)
    for _ in range(args.repeats):
        for name, backend in backends.items():
            begin = time.process_time()
            backend(tokens[:, step.columns[0]], step, states[name])
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
        print(f"{megabytes[name]:.0f} MB; rms of the error / std of the logits {error:.1e}")


if __name__ == "__main__":
    main()
