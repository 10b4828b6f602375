"""A denoising step in ONNX Runtime, fp32 and int8, beside the model's own forward pass, on a CPU.

usage: runtimes.py [--threads 1] [--repeats 30] [--columns 256] [--block 32]
A Dream of about 38M parameters (random). Each backend of the loop computes the same step, a block in the middle of a cache
that is filled (policy `dual`); the backends alternate. Prints the median CPU time of the step, that of the runtime's bare
call inside it, the ratio to eager, the size on disk, and how far the logits are from eager's.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import onnxruntime
import torch
import transformers

from dllm_hf import DreamConfig, DreamModel
from dllm_hf.generation.window import Frame, make_window
from dllm_hf.runtimes.onnx_export import export_onnx
from dllm_hf.runtimes.onnx_runtime import OnnxModel


def build_model() -> DreamModel:
    torch.manual_seed(0)
    special = {"mask_token_id": 12287, "pad_token_id": 12286, "eos_token_id": 12286, "bos_token_id": 12286}
    sizes = {"vocab_size": 12288, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    return DreamModel(DreamConfig(**sizes, **heads, **special)).eval()


class TimedSession:
    """An `InferenceSession` that notes the CPU time of its last call."""

    def __init__(self, session):
        self.session, self.seconds = session, 0.0

    def run(self, *args):
        begin = time.process_time()
        outputs = self.session.run(*args)
        self.seconds = time.process_time() - begin
        return outputs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", 1), ("repeats", 30), ("columns", 256), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a thread that waits takes CPU time

    model = build_model()
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} thread(s), torch {torch.__version__},", end=" "
    )
    print(f"transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}; Dream of {millions:.0f}M:")
    print(f"a step of {args.block} tokens over {args.columns} columns")
    models, megabytes = {"eager fp32": model}, {"eager fp32": 4 * millions}
    with tempfile.TemporaryDirectory() as folder:
        for name, quantization in (("ONNX Runtime fp32", None), ("ONNX Runtime int8", "int8")):
            path = export_onnx(model, Path(folder) / name, quantization)
            models[name] = OnnxModel.from_pretrained(path, options)
            models[name].session = TimedSession(models[name].session)
            megabytes[name] = sum(file.stat().st_size for file in path.glob("model.onnx*")) / 1e6
        measure(args, models, megabytes)


def measure(args: argparse.Namespace, models: dict, megabytes: dict[str, float]) -> None:
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
            if name != "eager fp32":
                bare[name].append(models[name].session.seconds)
    reference = logits["eager fp32"]
    eager = statistics.median(seconds["eager fp32"])
    for name, times in seconds.items():
        took = statistics.median(times)
        error = (logits[name] - reference).square().mean().sqrt() / reference.std()
        inside = f", of which {1e3 * statistics.median(bare[name]):.1f} in the bare call" if bare[name] else ""
        print(f"{name:18} {1e3 * took:6.1f} ms, {took / eager:.2f} of eager{inside};", end=" ")
        print(f"{megabytes[name]:.0f} MB; rms of the error / std of the logits {error:.1e}")


if __name__ == "__main__":
    main()
