"""Which kernels a forward pass of requests in flight consists of, on one GPU or on several that divide a model.

usage: torchrun --nproc-per-node N step_profile.py FOLDER [--requests 256] [--new 128]

SDAR-8B in 128 slots, prompts of 256 tokens, blocks of 4, one token a step; FOLDER: of weights, which `tensor_parallel.py --throughput
FOLDER` saves there. Each process runs an `LLM` of its own on its part of the model with the same requests, so that all come to the
same passes. Two rounds come first; in the third the first process is profiled. Milliseconds a pass by kind, the longest kernels,
when nothing runs, and percentiles of a sum over the GPUs, its wait for the others included.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tensor_parallel import SLOTS
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine.worker import load_part

PROMPT, LONGEST = 256, 20
KINDS = {"nvjet": "products", "cublas": "products", "_attend": "attention", "_combine": "attention"}
KINDS |= {"_divide": "sums", "_push": "sums", "nccl": "sums"}
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def kind_of(kernel: str) -> str:
    return next((kind for beginning, kind in KINDS.items() if beginning in kernel), "other")


def report(kernels: list[tuple[str, float, float]], passes: int, seconds: float) -> None:
    """`kernels`: name, begin and end in microseconds, by their begins."""
    kinds, names, counts, sums = Counter[str](), Counter[str](), Counter[str](), defaultdict[str, list[float]](list)
    end, idle = kernels[0][1], 0.0
    for name, begin, finish in kernels:
        idle, end = idle + max(begin - end, 0), max(end, finish)
        kinds[kind_of(name)] += finish - begin
        names[name] += finish - begin
        counts[name] += 1
        if name.startswith(("_divide", "_push")):
            sums[name].append(finish - begin)
    of_pass = lambda microseconds: f"{microseconds / 1000 / passes:7.3f} ms a pass"
    print(f"{passes} passes, {1000 * seconds / passes:.2f} ms each; nothing runs: {of_pass(idle)}")
    for kind, total in kinds.most_common():
        print(f"{of_pass(total)}  {kind}")
    for name, total in names.most_common(LONGEST):
        print(f"  {of_pass(total)} {counts[name] / passes:7.1f} x {total / counts[name]:7.1f} us  {name[:90]}")
    for name, times in sums.items():
        times.sort()
        shown = ", ".join(f"{100 * part:.0f}%: {times[int(part * len(times))]:.1f}" for part in PERCENTILES)
        print(f"{name}, us: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new", type=int, default=128, help="tokens of each")
    args = parser.parse_args()
    if not torch.cuda.is_available() or "RANK" not in os.environ:
        parser.error("This measures GPUs: torchrun --nproc-per-node N step_profile.py FOLDER.")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    if size > 1:
        distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
        model = load_part(str(args.folder), rank, size, torch.bfloat16, False)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16).cuda()
    llm = LLM(model, max_num_seqs=SLOTS, max_model_len=1024)
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randint(0, 100_000, (3, args.requests, PROMPT), generator=generator).tolist()
    params = SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True, denoising_steps=4, block_length=4)

    def run(llm: LLM, texts: list[list[int]]) -> tuple[int, float]:
        began, passes = time.perf_counter(), llm.load().num_forward_passes
        llm.generate(texts, params, use_tqdm=False)
        torch.cuda.synchronize()
        return llm.load().num_forward_passes - passes, time.perf_counter() - began

    for texts in rounds[:2]:
        run(llm, texts)
    if rank:
        run(llm, rounds[2])
    else:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            passes, seconds = run(llm, rounds[2])
        # Of a trace in a file: PyTorch's own list of so many events takes minutes to make.
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in ON_DEVICE)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size} GPUs")
        report([(name, begin, end) for begin, end, name in kernels], passes, seconds)
    del llm  # and its graphs, for which NCCL would wait
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
