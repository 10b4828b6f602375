"""What a first call takes more than the next, on a machine that never compiled the kernels and on one that has.

usage: first_call.py [--models sdar llada dream] [--weights bf16]

Seconds, each in a process of its own, with random weights, a prompt of 512 tokens and 64 new ones, after a call of the plain
path: with an empty cache of Triton's; with an empty one and kernels compiled one after the other as they are launched; with
the cache that the first process has left.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
from generate import MODELS, build, prompts, timed

POLICY = {"sdar": "block", "gladream": "block"}


@torch.no_grad()
def child(name: str, weights: str, is_parallel: bool) -> None:
    """Prints seconds of a plain call, of the first on the fast path, and of the next two."""
    if not is_parallel:
        from dllm_hf.fused import stack

        stack.FusedStack._compile_for = lambda *_: None
    model, block = build(name, weights), MODELS[name][2][0]
    ids = prompts(model.config.vocab_size, 1, 512)
    options = {"max_new_tokens": 64, "eos_token_id": [], "block_length": block, "temperature": 0.0}
    options["cache_policy"] = POLICY.get(name, "dual")
    call = lambda **more: timed(lambda: model.diffusion_generate(ids, **options, **more))[0]
    print(json.dumps([call(disable_compile=True), call(), call(), call()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sdar", "llada", "dream"])
    parser.add_argument("--weights", default="bf16", choices=["bf16", "fp8", "int8", "int4"])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("This measures a GPU, and there is none.")
    if args.child:
        child(args.child[0], args.weights, args.child[1] == "parallel")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores; seconds\n")
    print("| model | kernels | first call | next | difference |\n|---|---|---|---|---|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as other:
            runs = (("compiled one by one", other), ("compiled side by side", empty), ("in Triton's cache", empty))
            for what, cache in runs:
                how = "serial" if cache == other else "parallel"
                run = [sys.executable, __file__, "--weights", args.weights, "--child", name, how]
                environment = {**os.environ, "TRITON_CACHE_DIR": cache}
                printed = subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                _, first, second, third = json.loads(printed.splitlines()[-1])
                after = min(second, third)
                print(f"| {name} | {what} | {first:.2f} | {after:.2f} | {first - after:.2f} |", flush=True)


if __name__ == "__main__":
    main()
