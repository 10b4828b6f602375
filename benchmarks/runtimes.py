"""A denoising step in the runtimes of exported models beside the model's own forward pass, on a CPU.

usage: runtimes.py [--size 38] [--threads 1] [--repeats 30] [--columns 256] [--block 32]
A random Dream of so many million parameters (38, or 138, of which the embedding is a fifth). Each backend of the loop computes
the same step, the last block of a cache that is filled (of the policies `dual` and `prefix`); the backends alternate. Prints
the median CPU time of the step, that of the runtime's bare call inside it, the ratio to eager, the size on disk, and how far the
logits are from eager's. Runtimes that are not installed are left out, and named.
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

import torch

from dllm_hf import DreamConfig, DreamModel
from dllm_hf.generation.window import Frame, make_list, make_window
from dllm_hf.runtimes.exported import package
from dllm_hf.runtimes.gguf_export import export_gguf
from dllm_hf.runtimes.llama_cpp import LlamaCppModel
from dllm_hf.runtimes.onnx_export import export_onnx
from dllm_hf.runtimes.onnx_runtime import OnnxModel

EAGER = "eager fp32"
# Million parameters -> vocabulary, hidden size, inside of the MLP, layers, heads, heads of keys and values.
SIZES = {38: (12288, 512, 1536, 8, 8, 4), 138: (36864, 768, 2048, 13, 12, 4)}


def build_model(size: int) -> DreamModel:
    torch.manual_seed(0)
    vocab, hidden, inside, layers, heads, kv_heads = SIZES[size]
    special = {"mask_token_id": vocab - 1, **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), vocab - 2)}
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inside, "num_hidden_layers": layers}
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2048}
    return DreamModel(DreamConfig(**sizes, **heads, **special)).eval()


class Timed:
    """A function that notes the CPU time of its last call."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args):
        begin = time.process_time()
        outputs = self.function(*args)
        self.seconds = time.process_time() - begin
        return outputs


def export_all(model: DreamModel, folder: Path, threads: int) -> tuple[dict, dict[str, float], dict[str, Timed]]:
    """The model as each runtime reads it, the megabytes of its program, and the runtime's bare call."""
    models, files, bare = {}, {}, {}
    try:
        options = package("onnxruntime", "onnxruntime").SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a thread that waits takes CPU time
        for name, quantization in (("ONNX Runtime fp32", None), ("ONNX Runtime int8", "int8")):
            path = export_onnx(model, folder / name, quantization)
            models[name], files[name] = OnnxModel.from_pretrained(path, options), path.glob("model.onnx*")
            bare[name] = Timed(models[name].session.run)
            models[name].session = SimpleNamespace(run=bare[name])
    except ValueError as error:
        print(f"without ONNX Runtime: {error}")
    try:
        llama = package("llama_cpp", "llama-cpp")
        llama.llama_decode = decode = Timed(llama.llama_decode)
        for type in ("f32", "q8_0", "q4_k_m"):
            name = f"llama.cpp {type.upper()}"
            path = export_gguf(model, folder / name, type)
            models[name], files[name] = LlamaCppModel.from_pretrained(path, threads), path.glob("model.gguf")
            bare[name] = decode
    except ValueError as error:
        print(f"without llama.cpp: {error}")
    return models, {name: sum(each.stat().st_size for each in paths) / 1e6 for name, paths in files.items()}, bare


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=38, choices=SIZES)
    for name, value in (("threads", 1), ("repeats", 30), ("columns", 256), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.size)
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    share = 100 * model.model.embed_tokens.weight.numel() / 1e6 / millions
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime", "llama-cpp-python")]
    print(f"{platform.processor() or platform.machine()}, {args.threads} thread(s), {', '.join(versions)};", end=" ")
    print(
        f"Dream of {millions:.0f}M, embedding {share:.0f}%: a step of {args.block} tokens over {args.columns} columns"
    )
    with tempfile.TemporaryDirectory() as folder:
        models, megabytes, bare = export_all(model, Path(folder), args.threads)
        measure(args, {EAGER: model, **models}, {EAGER: 4 * millions, **megabytes}, bare)


def measure(args: argparse.Namespace, models: dict, megabytes: dict[str, float], bare: dict[str, Timed]) -> None:
    columns, first = args.columns, args.columns - args.block
    frames = [Frame(0, columns, 0, 0, columns, columns, 0, 0)]
    frames += [Frame(first - 1, columns, first, columns, columns, columns, first, 0)]
    tokens = torch.randint(0, 12000, (1, columns))
    steps, logits = {}, {}
    for name, model in models.items():
        backend = model.make_backend(True)
        state = backend.open(1, columns + 1)
        make = make_list if backend.takes_lists else make_window
        whole, step = (make([frame], [0], 1, columns, shift=1) for frame in frames)
        backend(tokens[0][whole.columns], whole, state)
        steps[name] = partial(backend, tokens[0][step.columns], step, state)
        logits[name] = steps[name]()
    seconds, inside = defaultdict(list), defaultdict(list)
    for _ in range(args.repeats):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
            if name in bare:
                inside[name].append(bare[name].seconds)
    eager = statistics.median(seconds[EAGER])
    for name, times in seconds.items():
        took = statistics.median(times)
        error = (logits[name] - logits[EAGER]).square().mean().sqrt() / logits[EAGER].std()
        of_which = f", of which {1e3 * statistics.median(inside[name]):.1f} in the bare call" if inside[name] else ""
        print(f"{name:18} {1e3 * took:6.1f} ms, {took / eager:.2f} of eager{of_which};", end=" ")
        size = megabytes[name] / megabytes[EAGER]
        print(f"{megabytes[name]:.0f} MB, {size:.3f}; rms of the error / std of the logits {error:.1e}")


if __name__ == "__main__":
    main()
