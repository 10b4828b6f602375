"""What a denoising step costs on one GPU and on several that divide a model, and what of it the all-reduces are.

usage: tensor_parallel.py [--gpus 1 2 4] [--models llada sdar sdar_moe] [--sums nccl divide shared] [--throughput FOLDER] [--host FOLDER]
                          [--kernels]

Random bf16 weights in the shapes of LLaDA-8B (policy `dual`, blocks of 32), SDAR-8B and SDAR-30B-A3B (`block`, blocks of
4), made on each GPU for its part; one sequence, a prompt of 512 tokens and 128 new ones. `step`: milliseconds of one step
more, as in generate.py. `reduces`: the part of it that the all-reduces are: the step without them subtracted. `mean`:
milliseconds of a call divided by its forward passes. `ratio`: the step beside that of the first number of GPUs.

`--throughput FOLDER`: tokens a second of SDAR-8B through `LLM` in 128 slots, 512 requests of 256 + 256 tokens, a
denoising step transferring one token; the weights, 16 GB, are saved into FOLDER first if they are not there. Two such rounds
come first, since a step of a shape is captured the second time. `--host FOLDER`: the same of a model with as many layers that
are small, so that what the host does limits it: processes, scheduling, launches.

`--kernels`: microseconds of a sum over all GPUs with the norm behind it, in a graph, by the number of tokens of 4,096 numbers in
bf16: `nccl`, an all-reduce and a kernel; `push`, `divide` and, where all have the total of all tokens, `whole`, see
`SharedSums`. Before it measures it checks that all GPUs have the same bits, and that they are right.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from generate import CONFIGS, MODELS, prompts, timed
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from dllm_hf import LLM, SamplingParams
from dllm_hf.fused import shared_sums
from dllm_hf.fused.shared_sums import SharedSums
from dllm_hf.generation.ranks import Ranks
from dllm_hf.kernels.layers import add_rms_norm, add_rms_norm_torch

SETTINGS = {"llada": ("dual", 32), "sdar": ("block", 4), "sdar_moe": ("block", 4)}
WAYS = ("nccl", "divide", "shared")  # divide: sums of few tokens as those of many
PROMPT, NEW, SLOTS, REQUESTS = 512, 128, 128, 512
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
KERNEL_TOKENS, HIDDEN, PUSHED = (4, 8, 32, 64, 128, 256, 512, 640, 1024, 2048, 4096), 4096, 2048


def build(name: str, size: int, **changes):
    """A model with random weights, in each process its part."""
    logging.set_verbosity_error()  # all weights are missing
    config = AutoConfig.from_pretrained(CONFIGS / MODELS[name][0], **changes)
    torch.manual_seed(0)
    if size == 1:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict={}, dtype=torch.bfloat16, tp_plan="auto")
    return model.eval()


def step_of(model, ids: torch.Tensor, options: dict, block: int) -> tuple[float, float]:
    """Milliseconds of a step, and of a call divided by its passes, one token a step."""

    def call(quota: int) -> tuple[float, int]:
        steps = block // quota
        return min((timed(lambda: model.diffusion_generate(ids, denoising_steps=steps, **options)) for _ in range(2)),
                   key=lambda each: each[0])  # fmt: skip

    model.release_graphs()
    call(1)  # compiles and captures
    (many, first), (few, second) = call(1), call(2)
    passes = first.num_forward_passes - second.num_forward_passes
    return 1000 * (many - few) / passes, 1000 * many / first.num_forward_passes


def measure(args: argparse.Namespace) -> None:
    """One process of a group, on its GPU."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    all_reduce, shared_bytes, pushed = Ranks.all_reduce, SharedSums.max_bytes, shared_sums.PUSHED
    for name in args.models:
        model, (policy, block) = build(name, size), SETTINGS[name]
        ids = prompts(model.config.vocab_size, 1, PROMPT)
        end = model.generation_config.eos_token_id
        options = {"max_new_tokens": NEW, "eos_token_id": [], "temperature": 0.0, "return_dict_in_generate": True}
        options |= {"suppress_tokens": end if isinstance(end, list) else [] if end is None else [end]}
        options |= {"remasking_strategy": "low_confidence_static", "cache_policy": policy, "block_length": block}
        without = None
        for way in args.sums if size > 1 else ["none"]:
            # What stands on the fused path is made anew with the fingerprint of the configuration.
            model.config.sums = way
            SharedSums.max_bytes = 0 if way == "nccl" else shared_bytes
            shared_sums.PUSHED = {} if way == "divide" else pushed
            step, mean = step_of(model, ids, options, block)
            if without is None:
                Ranks.all_reduce, SharedSums.max_bytes = (lambda ranks, x: x), 0
                model.config.sums = "without"
                without = step_of(model, ids, options, block)[0] if size > 1 else step
                Ranks.all_reduce = all_reduce
            found = {"model": name, "gpus": size, "sums": way, "step": step, "mean": mean}
            found |= {"reduces": step - without, "gib": torch.cuda.memory_allocated() / 2**30}
            if rank == 0:
                print(json.dumps(found), flush=True)
        model.release_graphs()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def measure_kernels() -> None:
    """One process of a group, on its GPU."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    shared_sums.PUSHED[size] = PUSHED * (size - 1) * HIDDEN * 2
    ranks = Ranks(distributed.group.WORLD)
    sums = SharedSums(ranks, torch.bfloat16, torch.device("cuda", rank), HIDDEN)
    norm = torch.nn.RMSNorm(HIDDEN, dtype=torch.bfloat16, device="cuda")
    for tokens in KERNEL_TOKENS:
        found = kernels_of(tokens, sums, norm, ranks)
        if rank == 0:
            print(json.dumps({"tokens": tokens, **found}), flush=True)
    distributed.destroy_process_group()


@torch.no_grad()
def kernels_of(tokens: int, sums: SharedSums, norm: torch.nn.Module, ranks: Ranks) -> dict[str, float]:
    """Microseconds of each way to a sum, and of the copies before those that stand for a product's result."""
    generator = torch.Generator().manual_seed(tokens)
    parts = torch.randn(ranks.size, tokens, HIDDEN, generator=generator).cuda().bfloat16()
    residual = torch.randn(1, tokens, HIDDEN, generator=generator).cuda().bfloat16()
    own, options = parts[ranks.rank], (1e-6, False)

    def divide(is_whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sums.part[:tokens].copy_(own)
        return sums._divide(residual, norm, *options, is_whole)

    ways = {
        "nccl": lambda: add_rms_norm(ranks.all_reduce(own.clone())[None], residual, norm.weight, *options),
        "divide": lambda: divide(False),
        "whole": lambda: divide(True),
    }
    if tokens <= PUSHED:
        ways["push"] = lambda: sums._push(own, residual, norm, *options)
    expected = add_rms_norm_torch(parts.float().sum(0).bfloat16()[None], residual, norm.weight, *options)
    found = {}
    for name, run in ways.items():
        normed, total = (each.clone() for each in run())
        every = ranks.all_gather(normed)
        shown = slice(ranks.rank, None, ranks.size) if name == "divide" else slice(None)
        errors = [normed - expected[0], (total - expected[1])[:, shown]]
        most = 0.25 if name == "nccl" else 0.1  # NCCL rounds after each part, of totals up to 16
        is_right = all(float(each.abs().max()) < most for each in errors if each.numel())
        if not is_right or (name != "nccl" and not bool((every == every[0]).all())):
            raise SystemExit(f"{name}, {tokens} tokens, rank {ranks.rank}: a wrong sum")
        found[name] = microseconds(run, ranks)
    return {**found, "copy": microseconds(lambda: sums.part[:tokens].copy_(own), ranks)}


def microseconds(run, ranks: Ranks, number: int = 40, replays: int = 20) -> float:
    """Of a call in a graph of many."""
    run()
    torch.cuda.synchronize()
    graph, begin, end = (
        torch.cuda.CUDAGraph(),
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(number):
            run()
    times = []
    for _ in range(replays):
        ranks.least(0, torch.device("cuda"))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / number)
    return round(sorted(times)[replays // 2], 2)


def measure_in_processes(size: int, args: argparse.Namespace):
    """Run [`measure`] or [`measure_kernels`] in `size` processes. Yields what the first prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--rank", "--models", *args.models, "--sums", *args.sums]
    command += ["--kernels"] if args.kernels else []
    running = []
    for rank in range(size):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
    yield from (json.loads(line) for line in running[0].stdout if line.startswith("{"))
    if any([each.wait() for each in running]):
        sys.exit(f"A process on {size} GPUs has failed.")


def throughput(folder: Path, size: int, **changes) -> tuple[float, float]:
    """Tokens a second of SDAR-8B through `LLM`, and milliseconds a forward pass. `changes`: of its configuration."""
    if not (folder / "config.json").exists():
        build("sdar", 1, **changes).save_pretrained(folder)
        torch.cuda.empty_cache()
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randint(0, 100_000, (3, REQUESTS, 256), generator=generator).tolist()
    params = SamplingParams(max_tokens=256, temperature=0.0, ignore_eos=True, denoising_steps=4, block_length=4)
    with LLM(folder, tensor_parallel_size=size, max_num_seqs=SLOTS, max_model_len=1024) as llm:
        for texts in rounds:
            began, passes = time.perf_counter(), llm.load().num_forward_passes
            outputs = llm.generate(texts, params, use_tqdm=False)
            seconds, passes = time.perf_counter() - began, llm.load().num_forward_passes - passes
    return sum(len(each.outputs[0].token_ids) for each in outputs) / seconds, 1000 * seconds / passes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--models", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--sums", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--throughput", type=Path)
    parser.add_argument("--host", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank:
        measure_kernels() if args.kernels else measure(args)
        return
    if args.kernels:
        for size in args.gpus:
            for row in measure_in_processes(size, args) if size > 1 else ():
                print(f"{size} GPUs", *(f"{name} {value}" for name, value in row.items()), flush=True)
        return
    first: dict[str, float] = {}
    for size in args.gpus if args.models else ():
        for row in measure_in_processes(size, args):
            base = first.setdefault(row["model"], row["step"])
            numbers = " ".join(f"{name} {row[name]:.3f}" for name in ("step", "mean", "reduces", "gib"))
            print(
                f"{row['model']:9} {size} GPUs {row['sums']:9} {numbers} ratio {row['step'] / base:.3f}",
                flush=True,
            )
    for name, folder, changes in (("sdar", args.throughput, {}), ("small layers", args.host, SMALL)):
        for size in args.gpus if folder else ():
            tokens, step = throughput(folder, size, **changes)
            print(f"{name}, {SLOTS} slots, {size} GPUs: {tokens:.0f} tokens/s, {step:.2f} ms a step", flush=True)


if __name__ == "__main__":
    main()
