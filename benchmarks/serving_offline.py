"""Many requests of mixed lengths: in flight, in static batches, and an autoregressive model beside them.

usage: serving_offline.py --model sdar-4b [--requests 512] [--slots 128] [--tokens-per-step 1 2 4] --out rows.jsonl
       serving_offline.py --model hub_configs/sdar-tiny-shakespeare --threshold 0.9 --mean-prompt 64 --mean-new 32 ...

Lengths are log-normal (prompts: mean 512, at most 2,048; new tokens: mean 256, at most 1,024; sigma 0.8) from a fixed seed.
Random weights forbid end tokens, so that each row ends by its own length. `flight`: `LLM` with so many slots. `static`:
`diffusion_generate` on batches of as many prompts in the order of arrival, each as long as its longest row asks. `equal`:
the same where all lengths are the means. `autoregressive`: continuous batching of `transformers` on a Qwen3 of SDAR's shape.

tokens_per_second: asked-for tokens over the time of all. first, latency: seconds from the start to a request's first text
and to its end (percentiles 50, 95, 99; all requests arrive at once). fed, wasted: columns that forward passes computed, and
the part of them that was padding or belonged to tokens that nobody asked for. scheduler: the part of the time that the
engine spent outside of the loop's steps. agrees: of 16 requests, how many got the tokens of `diffusion_generate` alone
(all must in float32; in bfloat16 rounding depends on the batch).
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from dllm_hf import LLM, SamplingParams
from dllm_hf.generation.configuration import as_token_list

CONFIGS = Path(__file__).parents[1] / "hub_configs"
SIGMA = 0.8
# Folder, block length, cache policy.
MODELS = {
    "sdar-4b": ("SDAR-4B-Chat", 4, "block"),
    "sdar-8b": ("SDAR-8B-Chat", 4, "block"),
    "llada-8b": ("LLaDA-8B-Instruct", 32, "dual"),
    "dream-7b": ("Dream-v0-Instruct-7B", 32, "dual"),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(name: str):
    if name not in MODELS:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(DEVICE).eval(), None, None
    folder, block, policy = MODELS[name]
    config = AutoConfig.from_pretrained(CONFIGS / folder)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model, block, policy


def workload(args, vocab: int) -> list[tuple[list[int], int]]:
    """Prompts and numbers of new tokens."""
    dice = random.Random(args.seed)

    def length(mean: float, most: int) -> int:
        return max(1, min(most, round(dice.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))))

    found = []
    for _ in range(args.requests):
        prompt = length(args.mean_prompt, 4 * args.mean_prompt)
        found.append(
            ([dice.randrange(min(vocab, 1000)) for _ in range(prompt)], length(args.mean_new, 4 * args.mean_new))
        )
    return found


def percentiles(values: list[float]) -> list[float]:
    values = sorted(values)
    return [round(values[min(int(len(values) * part), len(values) - 1)], 3) for part in (0.5, 0.95, 0.99)]


class Meter:
    """Counts what a decoder feeds, and times its steps."""

    def __init__(self, engine):
        self.fed = self.padding = self.steps = 0
        self.seconds = 0.0
        decoder = engine._decoder
        make, step = decoder._make_window, decoder.step

        def make_window(frames, slots):
            window = make(frames, slots)
            own = sum(frame.end - frame.start for frame in frames if frame.length)
            self.fed, self.padding = self.fed + window.columns.numel(), self.padding + window.columns.numel() - own
            return window

        def timed_step():
            began = time.perf_counter()
            finished = step()
            self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + 1
            return finished

        decoder._make_window, decoder.step = make_window, timed_step


def in_flight(model, work, options: dict, args, block, policy) -> dict:
    longest = max(len(prompt) + new for prompt, new in work) + (block or 32)
    llm = LLM(
        model,
        block_length=block,
        cache_policy=policy,
        max_num_seqs=args.slots,
        max_model_len=longest,
        max_num_batched_tokens=args.budget,
    )
    llm.generate([prompt for prompt, _ in work[:4]], SamplingParams(max_tokens=8, options=options), use_tqdm=False)
    meter = Meter(llm._driver.engine)
    params = [SamplingParams(max_tokens=new, options=options) for _, new in work]
    first, last, outputs, began = {}, {}, {}, time.perf_counter()
    for event in llm.generate_streaming([prompt for prompt, _ in work], params):
        now = time.perf_counter() - began
        first.setdefault(event.request_id, now)
        if event.output is not None:
            last[event.request_id] = now
            outputs[event.request_id] = event.output.token_ids
    seconds = time.perf_counter() - began
    texts = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.split("-")[1]))]
    sample = range(0, len(work), max(len(work) // 16, 1))
    agrees = sum(alone(model, work[index], options, block, policy) == texts[index] for index in sample)
    return {
        "mode": "flight",
        "seconds": seconds,
        "tokens_per_second": sum(map(len, texts)) / seconds,
        "first": percentiles(list(first.values())),
        "latency": percentiles(list(last.values())),
        "steps": meter.steps,
        "fed": meter.fed,
        "wasted": meter.padding / max(meter.fed, 1),
        "scheduler": 1 - meter.seconds / seconds,
        "agrees": f"{agrees} of {len(sample)}",
    }


def alone(model, request, options: dict, block, policy) -> list[int]:
    prompt, new = request
    ids = torch.tensor([prompt], device=model.device)
    output = model.diffusion_generate(ids, max_new_tokens=new, block_length=block, cache_policy=policy, **options)
    text = output[0, len(prompt) :].tolist()
    return text[: length_of(text, options, model)]


def length_of(text: list[int], options: dict, model) -> int:
    """Up to the first end of sequence, that included."""
    ends = as_token_list(options.get("eos_token_id", model.generation_config.eos_token_id))
    return min((index + 1 for index, token in enumerate(text) if token in ends), default=len(text))


def static(model, work, options: dict, args, block, policy, mode: str) -> dict:
    began, last, fed, asked = time.perf_counter(), [], 0, 0
    for start in range(0, len(work), args.slots):
        batch = work[start : start + args.slots]
        width, new = max(len(prompt) for prompt, _ in batch), max(new for _, new in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        output = model.diffusion_generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=new,
            block_length=block,
            cache_policy=policy,
            **options,
        )
        rows = output[:, width:].tolist()
        last += [time.perf_counter() - began] * len(batch)
        fed += len(batch) * new
        asked += sum(length_of(row[:own], options, model) for row, (_, own) in zip(rows, batch, strict=True))
    seconds = time.perf_counter() - began
    return {
        "mode": mode,
        "seconds": seconds,
        "tokens_per_second": asked / seconds,
        "first": percentiles(last),
        "latency": percentiles(last),
        "wasted": 1 - asked / fed,
    }


def autoregressive(model, work, args) -> dict:
    """Qwen3 in the model's shape, by the library's continuous batching."""
    config = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    config = Qwen3Config(**{name: getattr(config, name) for name in names}, eos_token_id=None, pad_token_id=0)
    with torch.device(DEVICE):
        qwen = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=args.attention).eval()
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    began, tokens, last = time.perf_counter(), 0, []
    with qwen.continuous_batching_context_manager(generation_config=generation, block=True, timeout=5) as manager:
        for prompt, new in work:
            manager.add_request(prompt, max_new_tokens=new)
        while len(last) < len(work):
            output = manager.get_result(timeout=60)
            if output is not None and output.is_finished():
                tokens += len(output.generated_tokens)
                last.append(time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return {
        "mode": f"autoregressive ({args.attention})",
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "latency": percentiles(last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--budget", type=int, default=2048, help="columns of prompts and canvases in a step")
    parser.add_argument("--mean-prompt", type=int, default=512)
    parser.add_argument("--mean-new", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threshold", type=float, help="of low_confidence_dynamic, in the place of a fixed number")
    parser.add_argument("--modes", nargs="+", default=["flight", "static", "equal", "autoregressive"])
    parser.add_argument("--attention", default="sdpa", help="of the autoregressive model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, block, policy = build(args.model)
    work = workload(args, model.config.vocab_size)
    size = block or model.default_block_length or 32
    settings = (
        [("threshold", args.threshold)] if args.threshold else [("tokens", each) for each in args.tokens_per_step]
    )
    for kind, value in settings:
        options = {"temperature": 0.0}
        if kind == "threshold":
            options |= {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": value}
        else:
            ends = as_token_list(model.generation_config.eos_token_id)
            options |= {"denoising_steps": -(-size // value), "eos_token_id": [], "suppress_tokens": ends}
        for mode in args.modes:
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if mode == "flight":
                row = in_flight(model, work, options, args, block, policy)
            elif mode == "autoregressive":
                row = autoregressive(model, work, args)
            else:
                means = [(prompt[:1] * args.mean_prompt, args.mean_new) for prompt, _ in work]
                row = static(model, work if mode == "static" else means, options, args, block, policy, mode)
            card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
            memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
            row |= {"model": args.model, kind: value, "slots": args.slots, "requests": args.requests, "GiB": memory}
            row |= {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}
            print(json.dumps(row), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
