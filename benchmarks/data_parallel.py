"""Replicas of a model on the GPUs of one machine: `LLM(data_parallel_size=1, 2, 4)`.

usage: data_parallel.py --out rows.jsonl [--model sdar-8b] [--sizes 1 2 4] [--requests 768] [--disk FOLDER]

Prompts and lengths are those of `serving_offline.py`, `--requests` for each replica, two tokens a step; each replica has 128
slots. Random bf16 weights, which are written to `--disk` once (16 GB) and read by every process. The prediction:
`scaling.py plan`.

tokens_per_second: asked-for tokens over the time of all. loading: seconds until the `LLM` is there. cpu_of_parent: of the
process that routes, cores in use.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from serving_offline import MODELS, build, workload

from dllm_hf import LLM, SamplingParams
from dllm_hf.generation.configuration import as_token_list

SLOTS = 128


def measure(args: argparse.Namespace, size: int, folder: str) -> dict:
    begun = time.perf_counter()
    with LLM(
        folder, data_parallel_size=size, max_num_seqs=SLOTS, max_model_len=3076, gpu_memory_utilization=0.85
    ) as llm:
        row = {"model": args.model, "replicas": size, "loading": time.perf_counter() - begun}
        work = workload(args, llm.model.config.vocab_size)
        ends = as_token_list(llm.model.generation_config.eos_token_id)
        options = {"temperature": 0.0, "denoising_steps": 2, "eos_token_id": [], "suppress_tokens": ends}
        # The shapes of steps come up, and are captured, before the clock runs.
        for share, most in ((work[: 3 * SLOTS * size], 160), (work, 10**6)):
            params = [SamplingParams(max_tokens=min(new, most), options=options) for _, new in share]
            begun, cpu = time.perf_counter(), time.process_time()
            outputs = llm.generate([prompt for prompt, _ in share], params, use_tqdm=False)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    completions = [output.outputs[0] for output in outputs]
    assert [len(each.token_ids) for each in completions] == [new for _, new in work], completions[0]
    tokens = sum(len(each.token_ids) for each in completions)
    row |= {"requests": len(work), "seconds": seconds, "tokens_per_second": tokens / seconds}
    return row | {"cpu_of_parent": cpu / seconds, "card": torch.cuda.get_device_name(), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="sdar-8b", choices=MODELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, default=768, help="for each replica")
    parser.add_argument("--disk", help="by default the folder for temporary files")
    parser.add_argument("--folder", help="of weights that are there, for one size in this process")
    args = parser.parse_args()
    args.mean_prompt, args.mean_new, args.seed = 512, 256, 0
    if args.folder is not None:
        args.requests *= args.sizes[0]
        row = measure(args, args.sizes[0], args.folder)
        print(json.dumps(row), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        model, _, _ = build(args.model, torch.bfloat16)
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        for size in args.sizes:  # each in a process of its own, which finds the GPUs empty
            command = [sys.executable, __file__, "--out", str(args.out), "--model", args.model, "--folder", folder]
            command += ["--sizes", str(size), "--requests", str(args.requests)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
