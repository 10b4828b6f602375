"""Gated linear attention of many blocks of 32 tokens: our torch form beside our kernel and those of
flash-linear-attention, on a GPU.

usage: gla_kernels.py [--heads 16] [--head-dim 128] [--block 32]
Both directions, from zero, as a layer of GLADream calls them. For each number of blocks the time of a forward pass (bf16)
and of a forward and backward pass, as the median of many, and the ratio to the torch form. The choice of
`attn_mode="auto"` is based on these numbers.
"""

import argparse

import torch
from timing import milliseconds
from torch.nn import functional as F

from dllm_hf.gla_dream.gated_linear_attention import block_scans, fla_kernels
from dllm_hf.gla_dream.scan_kernels import block_scans as kernel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    args = parser.parse_args()
    modes = ["torch", "kernel"] + (["chunk", "fused_recurrent"] if fla_kernels() else [])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.heads} heads of {args.head_dim}, bf16")
    for blocks in args.blocks:
        shape = (blocks, args.block, args.heads, args.head_dim)
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        inputs.append((F.logsigmoid(torch.randn(shape, device="cuda")) / 16).requires_grad_())

        def both(mode, inputs=inputs):
            return kernel(*inputs, 1) if mode == "kernel" else block_scans(*inputs, mode=mode)

        def forward(mode, both=both):
            with torch.no_grad():
                both(mode)

        def backward(mode, both=both, inputs=inputs):
            loss = sum(output.float().square().mean() for output in both(mode))
            torch.autograd.grad(loss, inputs)

        times = {
            mode: tuple(milliseconds(lambda: run(mode), repeats=20, warmup=5) for run in (forward, backward))  # noqa: B023
            for mode in modes
        }
        for mode, (once, training) in times.items():
            ratios = f"x{once / times['torch'][0]:.2f}, x{training / times['torch'][1]:.2f}"
            print(f"{blocks:5d} blocks  {mode:15s} forward {once:8.3f} ms, and backward {training:8.3f} ms  {ratios}")


if __name__ == "__main__":
    main()
