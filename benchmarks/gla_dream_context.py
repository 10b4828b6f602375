"""Time and memory of a generated block after a text of growing length, on a GPU: GLADream (the recommended configuration)
beside an SDAR of its size.

usage: gla_dream_context.py [--contexts 1024 8192 65536 262144] [--steps 8]
Random bf16 weights, about 1B parameters each, blocks of 32 tokens. After a prompt of random tokens in the cache each
model generates block after block; the time of a block is the difference of a long and a short turn, divided by the
blocks between them, which leaves out the fixed cost of a turn. Then prompt processing of 8k tokens at once, and block by
block.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers

from dllm_hf import GLADreamCache, GLADreamConfig, GLADreamModel, SDARConfig, SDARForCausalLM

RECOMMENDED = Path(__file__).parents[1] / "hub_configs" / "GLADream"
BLOCK = 32
SHAPE = {"vocab_size": 32000, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}
SHAPE |= {"block_size": BLOCK, "mask_token_id": 31999, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}


def build(model_class, config):
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = model_class(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def cache_bytes(cache) -> int:
    """Bytes of all tensors that the layers of a cache hold."""
    return sum(tensor.nbytes for tensor in cache.layer_tensors() if tensor.is_floating_point())


def turn(model, output, blocks: int, steps: int):
    """Decode `blocks` more blocks after an earlier turn. Returns the new turn's output and its seconds."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    output = model.diffusion_generate(
        output.sequences,
        past_key_values=output.past_key_values,
        max_new_tokens=blocks * BLOCK,
        denoising_steps=steps,
        return_dict_in_generate=True,
    )
    torch.cuda.synchronize()
    return output, time.perf_counter() - began


def measure_block(model, context: int, steps: int, repeats: int = 5) -> dict:
    model.release_graphs()
    weights = torch.cuda.memory_allocated()
    prompt = torch.randint(
        0, 31000, (1, context), device="cuda", generator=torch.Generator("cuda").manual_seed(context)
    )
    options = {"max_new_tokens": BLOCK, "denoising_steps": steps, "return_dict_in_generate": True}
    began = time.perf_counter()
    output = model.diffusion_generate(prompt, **options)
    torch.cuda.synchronize()
    prefill = time.perf_counter() - began
    output, _ = turn(model, output, 2, steps)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        output, short = turn(model, output, 1, steps)
        output, long = turn(model, output, 5, steps)
        times.append((long - short) / 4)
    cache = cache_bytes(output.past_key_values)
    return {
        "ms": 1000 * statistics.median(times),
        "cache": cache,
        "other": torch.cuda.max_memory_allocated() - weights - cache,
        "prefill": prefill,
    }


@torch.no_grad()
def measure_prefill(model, length: int) -> tuple[float, float]:
    """Seconds for a prompt at once, and block by block."""
    prompt = torch.randint(0, 31000, (1, length), device="cuda")

    def seconds(size: int) -> float:
        cache = GLADreamCache(model)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for start in range(0, length, size):
            model(prompt[:, start : start + size], past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(length)
    return statistics.median(seconds(length) for _ in range(5)), seconds(BLOCK)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 65536, 262144])
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a block")
    parser.add_argument("--layers", type=int, default=15)
    args = parser.parse_args()
    shape = {**SHAPE, "num_hidden_layers": args.layers, "max_position_embeddings": 2 * max(args.contexts)}
    gla_dream = GLADreamConfig.from_pretrained(RECOMMENDED, intermediate_size=5632, **shape)
    # SDAR's feed-forward networks are wider, so that it has as many parameters as GLADream with its gates.
    sdar = SDARConfig(intermediate_size=7680, head_dim=128, **shape)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, bf16")
    rows = {}
    for model_class, config in ((GLADreamModel, gla_dream), (SDARForCausalLM, sdar)):
        model = build(model_class, config)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{config.model_type}: {parameters / 1e9:.3f}B parameters, {args.steps} steps a block", flush=True)
        measure_block(model, 512, args.steps, repeats=2)
        for context in args.contexts:
            found = rows[config.model_type, context] = measure_block(model, context, args.steps)
            print(
                f"  context {context:6d}: {found['ms']:7.1f} ms a block, cache {found['cache'] / 2**20:8.1f} MiB, other "
                f"{found['other'] / 2**20:7.1f} MiB, first block after the prompt {found['prefill']:.2f} s",
                flush=True,
            )
        if config is gla_dream:
            at_once, by_blocks = measure_prefill(model, 8192)
            print(f"  prompt of 8192: {at_once:.4f} s at once, {by_blocks:.3f} s by blocks, x{by_blocks / at_once:.1f}")
        del model
        torch.cuda.empty_cache()
    for context in args.contexts:
        ours, theirs = rows["gla_dream", context], rows["sdar", context]
        print(
            f"context {context:6d}: GLADream / SDAR: time {ours['ms'] / theirs['ms']:.2f}, "
            f"cache {ours['cache'] / theirs['cache']:.4f}"
        )


if __name__ == "__main__":
    main()
