"""What the host does in a call of `diffusion_generate` before it launches the model: checks, buffers, the first window.

    python benchmarks/host_time.py [--repeats 50] [--families llada sdar]

The models have as many layers as the published ones of 8B parameters, and are small otherwise: the time depends on the
number of modules and not on their size. Prints the median milliseconds from the call to the model's first kernel launch
(its embedding, or the replay of a graph), after warm-up calls of the same shape.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dllm_hf  # noqa: F401  registers the models

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
FAMILIES = {
    "llada": ({"num_hidden_layers": 32, "vocab_size": 1024}, "dual"),
    "sdar": ({"num_hidden_layers": 36, "vocab_size": 1024, "head_dim": 64}, "block"),
}


class Stopwatch:
    """Measures the time from a call to the model's first kernel launch."""

    def __init__(self):
        self.began, self.launched = 0.0, None
        self.watch(torch.nn.functional, "embedding")
        if torch.cuda.is_available():
            self.watch(torch.cuda.CUDAGraph, "replay")

    def watch(self, owner, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args, **kwargs):
            if self.launched is None:
                self.launched = time.perf_counter()
            return original(*args, **kwargs)

        setattr(owner, name, noted)

    def milliseconds(self, call) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.launched, self.began = None, time.perf_counter()
        call()
        return 1000 * (self.launched - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    watch = Stopwatch()
    for family in arguments.families:
        changes, policy = FAMILIES[family]
        special = {"mask_token_id": 1000, "eos_token_id": 1001, "pad_token_id": 1001, "bos_token_id": None}
        config = AutoConfig.for_model(family, **{**SIZES, **changes, **special})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
        for batch in (1, 8):
            ids = torch.randint(0, 900, (batch, 256)).to(device)
            options = {"max_new_tokens": 32, "block_length": 32, "denoising_steps": 2, "cache_policy": policy}
            call = lambda: model.diffusion_generate(ids, eos_token_id=[], **options)  # noqa: B023
            for _ in range(4):
                call()
            times = [watch.milliseconds(call) for _ in range(arguments.repeats)]
            print(f"{family}, {policy}, batch {batch}: {statistics.median(times):.2f} ms", flush=True)


if __name__ == "__main__":
    main()
