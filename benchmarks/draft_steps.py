"""Draft and verify (`draft_steps`): how many forward passes it saves, and how much time on a GPU.

usage: draft_steps.py passes [--checkpoints llada dream sdar] [--drafts 1 2 3 4 8] [--tokens 1 2]
       draft_steps.py gpu --out rows.jsonl [--models llada dream sdar] [--drafts 2 3 4 8]

`passes`: the Shakespeare checkpoints of hub_configs/ continue eight speakers by 192 characters, greedily, one token a step (or
`--tokens` of them); checks that the text is that of one step at a time, and prints the passes and CPU time of each number of
drafts.

`gpu`: random bf16 weights in the shapes of LLaDA-8B and Dream-7B (`dual`, blocks of 32) and SDAR-8B (blocks of 4 and 32), one
sequence, a prompt of 512 tokens and 256 new ones, one token a step. Random weights would accept other drafts than trained ones:
how many steps each pass takes is imposed, from the passes of the Shakespeare checkpoint of the family with as many drafts. A
line for each number of drafts: milliseconds a pass, beside those of a step without drafts; tokens a second; the gain in passes
and in time, and the ratio of both; and how many drafts `draft_steps="auto"` finds worth their cost. `--batches 2 4` does the same
for more sequences.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  registers the models
from dllm_hf.generation import step
from dllm_hf.generation.draft_costs import room_for_drafts, tokens_of_step
from dllm_hf.generation.pool import fused_of

CONFIGS = Path(__file__).parents[1] / "hub_configs"
SPEAKERS = (
    "ROMEO",
    "JULIET",
    "MENENIUS",
    "KING RICHARD III",
    "First Citizen",
    "DUKE VINCENTIO",
    "LEONTES",
    "KATHARINA",
)
STATIC = {"remasking_strategy": "low_confidence_static", "temperature": 0.0, "return_dict_in_generate": True}


@contextmanager
def replaced(function: Callable) -> Iterator[None]:
    """With `function` in the place of `drafts.confirmed`."""
    original, step.confirmed = step.confirmed, function
    try:
        yield
    finally:
        step.confirmed = original


def noting(found: list[int]) -> Callable:
    """`drafts.confirmed`, which notes how many steps each pass with drafts has taken."""
    original = step.confirmed

    def confirmed(copies, *rest):
        taken = original(copies, *rest)
        if copies.shape[1] > 1:
            found.extend(taken.sum(-1).tolist())
        return taken

    return confirmed


def imposing(pattern: list[int], device: str) -> Callable:
    """What takes as many steps as the pattern says, one after the other, for as long as steps are left."""
    counts, passes = torch.tensor(pattern, device=device), torch.zeros((), dtype=torch.long, device=device)

    def confirmed(copies, level, now, nexts, moves):
        level, is_canvas = level[copies], torch.zeros_like(copies, dtype=torch.bool)
        is_canvas[:, 0] = True
        if copies.shape[1] == 1:
            return is_canvas
        # The first draft of each length holds the best proposals, so that each follows from the one before.
        is_first = ~(level[:, :, None] == level[:, None]).tril(-1).any(-1)
        # Indexing by a number on the device would read it.
        most = counts.index_select(0, (passes % len(counts)).view(1))
        taken = is_canvas | (is_first & (level > 0) & (level < most) & moves[copies])
        passes.add_(1)
        return taken

    return confirmed


def shakespeare(family: str, drafts: int, tokens: int, device: str, **options) -> tuple[int, float, list[int], list]:
    """Passes, CPU seconds, the steps of each pass with drafts, and the texts."""
    folder = CONFIGS / f"{family}-tiny-shakespeare"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer, passes, steps, texts = AutoTokenizer.from_pretrained(folder), 0, list[int](), []
    block = options.pop("block_length", None) or model.generation_config.block_length or model.default_block_length
    pace = {"block_length": block, "denoising_steps": -(-block // tokens), "max_new_tokens": 192}
    began = time.process_time()
    with replaced(noting(steps)):
        for speaker in SPEAKERS:
            ids = tokenizer(f"{speaker}:\n", return_tensors="pt").input_ids.to(device)
            output = model.diffusion_generate(
                ids, draft_steps=drafts, disable_compile=True, **pace, **STATIC, **options
            )
            passes += output.num_forward_passes
            texts.append(output.sequences.tolist())
    return passes, time.process_time() - began, steps, texts


def measure_passes(args) -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} thread")
    for family in args.checkpoints:
        for policy in args.policies or (("block",) if family == "sdar" else ("dual",)):
            for tokens in args.tokens:
                same = {"tokens": tokens, "device": "cpu", "cache_policy": policy, "block_length": args.block_length}
                alone, seconds, _, texts = shakespeare(family, 0, **same)
                print(f"{family} {policy}, {tokens} tokens a step: {alone} passes, {seconds:.1f} s of CPU")
                for drafts in args.drafts:
                    passes, seconds, _, drafted = shakespeare(family, drafts, **same)
                    if drafted != texts:
                        sys.exit(f"{family}: {drafts} drafts have changed the text")
                    print(
                        f"  {drafts} drafts: {passes} passes, {alone / passes:.2f} times fewer, {seconds:.1f} s",
                        flush=True,
                    )


def rows_of(model, name: str, batch: int, block: int, numbers: list[int]) -> Iterator[dict]:
    """A row of the result for each number of drafts."""
    from generate import prompts, timed  # beside this file

    ids, end = prompts(model.config.vocab_size, batch, 512), model.generation_config.eos_token_id
    policy = {"cache_policy": "block" if name == "sdar" else "dual", "block_length": block}
    options = {**STATIC, **policy, "max_new_tokens": 256, "eos_token_id": []}
    options["suppress_tokens"] = end if isinstance(end, list) else [end]
    resolved, shape = model.resolve_options(None, options), (batch, 512 + 256)
    _, most = room_for_drafts("auto", model, fused_of(model)[0], resolved, shape)
    alone, auto = None, most // tokens_of_step(model, resolved, shape) - 1 if most else 0
    for drafts in numbers:
        pattern = shakespeare(name, drafts, 1, "cuda", **policy)[2] if drafts else [1]
        call = partial(model.diffusion_generate, ids, draft_steps=drafts, **options)
        with replaced(imposing(pattern, "cuda") if drafts else step.confirmed):
            for _ in range(3):  # compiles, captures
                call()
            seconds, output = sorted((timed(call) for _ in range(5)), key=lambda each: each[0])[2]
        model.release_graphs()
        passes = output.num_forward_passes
        alone = alone or (seconds, passes)
        yield {
            "model": name, "batch": batch, "block": block, "drafts": drafts, "auto": auto, "passes": passes,
            "steps a pass": sum(pattern) / len(pattern), "ms a pass": 1000 * seconds / passes,
            "tokens a second": 256 * batch / seconds, "fewer passes": alone[1] / passes, "less time": alone[0] / seconds,
            "ratio": alone[0] / seconds / (alone[1] / passes),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%F"),
        }  # fmt: skip


def measure_gpu(args) -> None:
    from generate import build  # beside this file

    for name in args.models:
        model = build(name)
        for batch, block in itertools.product(args.batches, (4, 32) if name == "sdar" else (32,)):
            for row in rows_of(model, name, batch, block, [0, *args.drafts]):
                print(json.dumps(row), flush=True)
                with open(args.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
        del model
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    passes = commands.add_parser("passes", help="forward passes of trained checkpoints, on a CPU")
    passes.add_argument("--checkpoints", nargs="+", default=["llada", "dream", "sdar"])
    passes.add_argument("--drafts", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    passes.add_argument("--tokens", nargs="+", type=int, default=[1], help="tokens a step")
    passes.add_argument("--policies", nargs="+", help="by default dual, of sdar block")
    passes.add_argument("--block-length", type=int, help="by default 32")
    gpu = commands.add_parser("gpu", help="milliseconds of the published models' shapes, on a GPU")
    gpu.add_argument("--models", nargs="+", default=["llada", "dream", "sdar"])
    gpu.add_argument("--drafts", nargs="+", type=int, default=[2, 3, 4, 8])
    gpu.add_argument("--batches", nargs="+", type=int, default=[1])
    gpu.add_argument("--out", required=True)
    args = parser.parse_args()
    (measure_passes if args.command == "passes" else measure_gpu)(args)


if __name__ == "__main__":
    main()
