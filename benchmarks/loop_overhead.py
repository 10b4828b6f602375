"""What the denoising loop costs on top of the forward passes that it makes, on a CPU.

usage: loop_overhead.py [--repeats 5] [--new-tokens 64] [--prompt 128] [--threads 2]
A LLaDA of about 100M parameters (random, float32). For each cache policy `diffusion_generate` runs once while its
forward passes are recorded; then it and the bare passes (same inputs, same cache) alternate. Prints the ratio of their
median times, and how many rows of logits the head computed for each pass.
"""

import argparse
import platform
import statistics
import time

import torch
import transformers

from dllm_hf import CanvasCache, LLaDAConfig, LLaDAModelLM


def build_model() -> LLaDAModelLM:
    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=16384,
        d_model=640,
        n_heads=10,
        n_layers=12,
        mlp_hidden_size=2560,
        max_sequence_length=1024,
        mask_token_id=16383,
        eos_token_id=16382,
        pad_token_id=16382,
    )
    return LLaDAModelLM(config).eval()


def noted_passes(model, decode):
    """The keyword arguments of each forward pass of `decode`, with its cache's window and width."""
    passes = []

    def note(_, args, kwargs):
        cache = kwargs["past_key_values"]
        at = None if cache is None else (cache.layers[0].window, cache.layers[0].width)
        passes.append(({**kwargs, "input_ids": kwargs["input_ids"].clone()}, at))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    decode()
    handle.remove()
    return passes


@torch.no_grad()
def run_bare(model, passes):
    at = passes[0][1]
    cache = None if at is None else CanvasCache(model, at[1])
    for kwargs, at in passes:
        if cache is not None:
            cache.set_window(at[0])
        model(**{**kwargs, "past_key_values": cache})


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 5), ("new-tokens", 64), ("prompt", 128), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model()
    print(
        f"{platform.machine()}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, "
        f"prompt {args.prompt}, {args.new_tokens} new tokens, blocks of 32, one token a step"
    )
    prompt = torch.randint(0, 16000, (1, args.prompt))
    for policy in ("none", "dual"):

        def decode(policy=policy):
            return model.diffusion_generate(
                prompt, max_new_tokens=args.new_tokens, block_length=32, cache_policy=policy, eos_token_id=[]
            )

        passes = noted_passes(model, decode)
        rows = {kwargs["logits_to_keep"].shape[1] for kwargs, _ in passes}
        run_bare(model, passes)
        loop, bare = [], []
        for _ in range(args.repeats):
            loop.append(seconds(decode))
            bare.append(seconds(lambda passes=passes: run_bare(model, passes)))
        ratio = statistics.median(loop) / statistics.median(bare)
        print(
            f"{policy:4s}: {len(passes)} passes, {statistics.median(loop):.2f} s against {statistics.median(bare):.2f} s "
            f"bare, ratio {ratio:.3f}, rows of logits per pass {sorted(rows)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
