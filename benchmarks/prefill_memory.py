"""Peak memory of processing a long prompt with SDAR's block cache, on a GPU.

usage: prefill_memory.py [--lengths 4096 8192 16384 32768 65536] [--layers 36 ...]
Random bf16 weights in the shape of SDAR-8B. Prints a line per length: the peak above weights and cache, and its growth
per token since the length before. This growth doubles with the length if memory is quadratic in it, and is constant if
memory is linear.
"""

import argparse

import torch
import transformers

from dllm_hf import SDARConfig, SDARForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 4096, "intermediate": 12288, "layers": 36, "heads": 32, "kv_heads": 8, "vocab": 151936}
    for name, default in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    args = parser.parse_args()

    config = SDARConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2 * max(args.lengths),
        eos_token_id=None,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = SDARForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    weights = torch.cuda.memory_allocated()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"weights {weights / 2**30:.2f} GiB, bf16, block 4, 8 new tokens, chunks of 2048"
    )
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    before = None
    for length in args.lengths:
        prompt = torch.randint(0, 1000, (1, length), device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        output = model.diffusion_generate(prompt, **options)
        peak = torch.cuda.max_memory_allocated()
        cache = sum(t.numel() * t.element_size() for x in output.past_key_values.layers for t in (x.keys, x.values))
        above = peak - weights - cache
        added = (
            "" if before is None else f", {(above - before[1]) / (length - before[0]) / 1024:.2f} KiB per token added"
        )
        print(
            f"prompt {length:6d}: cache {cache / 2**30:.3f} GiB, above weights and cache {above / 2**30:.3f} GiB{added}",
            flush=True,
        )
        before = length, above
        del output


if __name__ == "__main__":
    main()
