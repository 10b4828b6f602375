"""A step of training of GLADream (forward and backward) with our kernels for whole texts and with the torch form, on a GPU.

usage: gla_training.py [--windows 32] [--length 512] [--block 8] [--layers 30] [--kernels]
In the shape of SmolLM2-135M, random weights, bf16 autocast, compiled layer by layer, as `examples/adapt.py --compile_layers`
trains. Of each: seconds of the first two steps, milliseconds of a step, tokens a second, peak memory; and the ratio of their
times. `--kernels` lists the kernels of a step that take longest.
"""

import argparse
import time

import torch
from timing import milliseconds
from torch.profiler import ProfilerActivity, profile

from dllm_hf import GLADreamConfig, GLADreamModel
from dllm_hf.gla_dream import attention_gla_dream, gated_linear_attention

MASK, VOCABULARY = 16, 49152
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "mask_token_id": MASK, "logits_shift": 1, "tie_word_embeddings": True}
SHAPE |= {"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
SHAPE |= {"inter_block_injection_mode": "boundary", "share_inter_intra_gate_weights": True, "gate_logit_normalizer": 4}


def new_step(args):
    torch.manual_seed(0)
    config = GLADreamConfig(block_size=args.block, num_hidden_layers=args.layers, **SHAPE)
    model = GLADreamModel(config).cuda().train()
    for layer in model.model.layers:
        layer.compile()
    clean = torch.randint(MASK + 1, VOCABULARY, (args.windows, args.length), device="cuda")
    noisy = torch.where(torch.rand(clean.shape, device="cuda") < 0.5, MASK, clean)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=noisy, labels=clean).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def report(name: str, args) -> float:
    torch._dynamo.reset()
    step, begun = new_step(args), time.perf_counter()
    losses = [step().item() for _ in range(2)]
    first = time.perf_counter() - begun
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(step, repeats=8, warmup=1)
    rate, memory = args.windows * args.length / took * 1000, torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{name:10s} {took:6.0f} ms a step, {rate:7.0f} tokens a second, {memory:5.1f} GiB, "
        f"first two steps {first:.0f} s, loss {losses[0]:.4f}",
        flush=True,
    )
    if args.kernels:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        for event in events[:30]:
            print(f"{event.self_device_time_total / 1000:10.2f} ms {event.count:5d} x {event.key[:120]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--kernels", action="store_true")
    args = parser.parse_args()
    torch._functorch.config.backward_pass_autocast = "off"  # see docs/gla_dream.md
    torch._dynamo.config.cache_size_limit = 64
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.windows} windows of {args.length}")
    ours = report("kernels", args)
    gated_linear_attention.takes_scans = attention_gla_dream.takes_reads = lambda *_: False
    print(f"kernels / torch form: {ours / report('torch form', args):.2f}")


if __name__ == "__main__":
    main()
