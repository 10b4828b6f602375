"""Many requests of mixed lengths: in flight, in static batches, and an autoregressive model beside them.

usage: serving_offline.py --model sdar-4b [--requests 1024] [--slots 128] [--tokens-per-step 1 2 4] --out rows.jsonl
       serving_offline.py --model hub_configs/sdar-tiny-shakespeare --threshold 0.9 --mean-prompt 64 --mean-new 32 ...

Lengths are log-normal (prompts: mean 512, at most 2,048; new tokens: mean 256, at most 1,024; sigma 0.8) from a fixed seed.
Random weights forbid end tokens, so that each row ends by its own length. `flight`: `LLM` with so many slots. `static`:
`diffusion_generate` on batches of as many prompts in the order of arrival, each as long as its longest row asks. `equal`:
the same where all lengths are the means; both on the first 4 * slots requests. `autoregressive`: continuous batching of
`transformers` on a Qwen3 of SDAR's shape.

tokens_per_second: asked-for tokens over the time of all; sustained: from when all slots are in use to when no request waits
any more. first, latency: seconds from the start to a request's first text
and to its end (percentiles 50, 95, 99; all requests arrive at once). fed, wasted: columns that forward passes computed, and
the part of them that was padding or belonged to tokens that nobody asked for. agrees: of 16 requests, how many got the tokens
of `diffusion_generate` alone, in float32, where all must (in bfloat16 rounding depends on the batch).

On a GPU, of all passes in flight: over_floor, their time on the device over that of their matrix products alone (in a CUDA
graph, at as many tokens; the head's at the positions of blocks) plus reading the keys and values of their rows once, at the
speed of a copy. host: the part of the time in which no pass was on the device, so that the scheduler was not hidden. Steps are told apart as
full ones, those of the last requests, when three quarters of the slots are not in use any more, and those that compute prompts
as well.

`shared`: what a beginning of 2,000 tokens costs one request, and 64 that share it: seconds, less what these take when they have
no such beginning (`without`); medians of five interleaved runs.
"""

import argparse
import gc
import json
import math
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy
import torch
import transformers
from timing import captured, milliseconds
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from dllm_hf import LLM, SamplingParams
from dllm_hf.generation.cache import column_bytes_of
from dllm_hf.generation.configuration import CACHE_DTYPES, as_token_list

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


def build(name: str, dtype: torch.dtype):
    if name not in MODELS:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(DEVICE).eval(), None, None
    folder, block, policy = MODELS[name]
    config = AutoConfig.from_pretrained(CONFIGS / folder)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
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


class Floor:
    """Seconds that a pass takes at least: its matrix products, and reading keys and values."""

    SIZES = (8, 16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1536, 2048, 3072, 4096, 6144)

    @torch.no_grad()
    def __init__(self, model, cache_dtype: str | None):
        self.column = column_bytes_of(model, cache_dtype)
        head = model.lm_head.weight
        layers = [
            each.weight for each in model.modules() if isinstance(each, torch.nn.Linear) and each.weight is not head
        ]
        self.layers = [self._seconds(layers, size) for size in self.SIZES]
        self.head = [self._seconds([head], size) for size in self.SIZES]
        source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        self.bytes_per_second = 2 * len(source) / (milliseconds(lambda: target.copy_(source)) / 1000)

    def _seconds(self, weights: list[torch.Tensor], rows: int) -> float:
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=DEVICE, dtype=w.dtype) for w in weights}

        def run():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        return milliseconds(captured(run), 5, 1) / 1000

    def of(self, tokens: int, kept: int, seen: int) -> float:
        """`seen`: columns that all rows together see."""
        products = self._at(self.layers, tokens) + (self._at(self.head, kept) if kept else 0)
        return products + seen * self.column / self.bytes_per_second

    def _at(self, seconds: list[float], size: int) -> float:
        return float(numpy.interp(size, self.SIZES, seconds))


class Meter:
    """Counts what a decoder feeds, and how long its passes take on the device."""

    def __init__(self, engine, floor: Floor | None):
        self.fed = self.padding = self.steps = 0
        self.floor, self.floors, self.events = floor, [], []
        self.decoder = decoder = engine._decoder
        self.make, self.launch, self.run = decoder._make_window, decoder.launch, decoder._run
        decoder._make_window, decoder.launch, decoder._run = self.make_window, self.count_step, self.time_pass
        self.known = len(decoder.workspace.graphs.steps)

    def make_window(self, frames, slots):
        window = self.make(frames, slots)
        own = sum(frame.end - frame.start for frame in frames if frame.length > 1)
        self.fed, self.padding = self.fed + window.columns.numel(), self.padding + window.columns.numel() - own
        kept = sum(frame.last - frame.first for frame in frames)
        real = [frame for frame in frames if frame.length > 1]
        self.present = (own, kept, sum(frame.end if frame.grid else frame.length for frame in real), len(real))
        return window

    def count_step(self):
        self.steps += 1
        return self.launch()

    def time_pass(self, *arguments):
        if self.floor is None:
            return self.run(*arguments)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        self.run(*arguments)
        events[1].record()
        self.events.append(events)
        self.floors.append(self.present)

    def figures(self, seconds: float) -> dict:
        """What is printed."""
        row = {"steps": self.steps, "fed": self.fed, "wasted": self.padding / max(self.fed, 1)}
        if self.floor is not None:
            row["new_shapes"] = len(self.decoder.workspace.graphs.steps) - self.known
            torch.cuda.synchronize()
            times = [start.elapsed_time(end) / 1000 for start, end in self.events]
            floors = [self.floor.of(*each[:3]) for each in self.floors]
            row |= {"over_floor": sum(times) / sum(floors), "host": 1 - sum(times) / seconds}
            most = max(rows for *_, rows in self.floors)
            for name, wanted in (
                ("steps_full", lambda own, kept, rows: own <= 2 * kept and rows >= 0.75 * most),
                ("steps_draining", lambda own, kept, rows: own <= 2 * kept and rows < 0.75 * most),
                ("with_prompts", lambda own, kept, rows: own > 2 * kept),
            ):
                chosen = [index for index, (own, kept, _, rows) in enumerate(self.floors) if wanted(own, kept, rows)]
                if chosen:
                    part, least = (sum(each[index] for index in chosen) for each in (times, floors))
                    row[name] = {"passes": len(chosen), "ms": 1000 * part / len(chosen), "over_floor": part / least}
        return row


def engine_for(model, work, args, block, policy, **more) -> LLM:
    longest = max(len(prompt) + new for prompt, new in work) + (block or 32)
    return LLM(
        model,
        block_length=block,
        cache_policy=policy,
        cache_dtype=args.cache_dtype,
        max_num_seqs=args.slots,
        max_model_len=longest,
        max_num_batched_tokens=args.budget,
        gpu_memory_utilization=0.85,
        **more,
    )


def in_flight(model, work, options: dict, args, block, policy, floor: Floor | None) -> dict:
    llm = engine_for(model, work, args, block, policy)
    # The shapes of steps come up, and are captured, before the clock runs.
    asked = {"options": options, "logprobs": args.logprobs}
    warm = [SamplingParams(max_tokens=min(new, 160), **asked) for _, new in work[: 3 * args.slots]]
    llm.generate([prompt for prompt, _ in work[: len(warm)]], warm, use_tqdm=False)
    meter = Meter(llm._driver.engine, floor)
    params = [SamplingParams(max_tokens=new, **asked) for _, new in work]
    first, last, outputs, began = {}, {}, {}, time.perf_counter()
    told, full, engine = 0, [], llm._driver.engine
    for event in llm.generate_streaming([prompt for prompt, _ in work], params):
        now, told = time.perf_counter() - began, told + len(event.token_ids)
        if engine.waiting and len(engine.running) == args.slots:
            full.append((now, told))
        first.setdefault(event.request_id, now)
        if event.output is not None:
            last[event.request_id] = now
            outputs[event.request_id] = event.output.token_ids
    seconds = time.perf_counter() - began
    texts = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.split("-")[1]))]
    sample = range(0, len(work), max(len(work) // 16, 1)) if model.dtype == torch.float32 else ()
    typed = {**options, "cache_dtype": args.cache_dtype}
    agrees = sum(alone(model, work[index], typed, block, policy) == texts[index] for index in sample)
    return {
        "mode": "flight",
        "logprobs": args.logprobs,
        "seconds": seconds,
        "tokens_per_second": sum(map(len, texts)) / seconds,
        "sustained": (full[-1][1] - full[0][1]) / (full[-1][0] - full[0][0]) if len(full) > 1 else None,
        "first": percentiles(list(first.values())),
        "latency": percentiles(list(last.values())),
        **meter.figures(seconds),
        "agrees": f"{agrees} of {len(sample)}",
    }


def shared(model, options: dict, args, block, policy) -> dict:
    """One request, and 64, with a beginning of 2,000 tokens and without it."""
    dice, llm = random.Random(args.seed), engine_for(model, [([0] * 2100, 100)], args, block, policy)
    params = SamplingParams(max_tokens=block or 32, options={**options, "denoising_steps": 1})
    every: dict[tuple[int, int], list[float]] = defaultdict(list)
    for length in (0, 2000) * 8:  # the last five of each count: kernels are compiled, steps are graphs
        for number in (1, 64):
            beginning = [dice.randrange(1000) for _ in range(length)]
            prompts = [[*beginning, dice.randrange(1000), own] for own in range(number)]
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            every[number, length].append(time.perf_counter() - began)
    seconds = {case: statistics.median(found[-5:]) for case, found in every.items()}
    one, many = (seconds[number, 2000] - seconds[number, 0] for number in (1, 64))
    without = {"one": seconds[1, 0], "64": seconds[64, 0]}
    return {"mode": "shared", "one": one, "64": many, "ratio": many / one, "without": without}


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
            cache_dtype=args.cache_dtype,
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
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--budget", type=int, default=2048, help="columns of prompts and canvases in a step")
    parser.add_argument("--mean-prompt", type=int, default=512)
    parser.add_argument("--mean-new", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threshold", type=float, help="of low_confidence_dynamic, in the place of a fixed number")
    parser.add_argument("--logprobs", type=int, help="flight: so many of each token, and its own")
    parser.add_argument("--modes", nargs="+", default=["flight", "static", "equal", "autoregressive"])
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of keys and values; the model's own if not given")
    parser.add_argument("--attention", default="sdpa", help="of the autoregressive model")
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, block, policy = build(args.model, getattr(torch, args.dtype))
    work = workload(args, model.config.vocab_size)
    floor = Floor(model, args.cache_dtype) if DEVICE == "cuda" and "flight" in args.modes else None
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
                model.release_graphs()
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if mode == "flight":
                row = in_flight(model, work, options, args, block, policy, floor)
            elif mode == "shared":
                row = shared(model, options, args, block, policy)
            elif mode == "autoregressive":
                row = autoregressive(model, work, args)
            else:
                some = work[: 4 * args.slots]
                means = [(prompt[:1] * args.mean_prompt, args.mean_new) for prompt, _ in some]
                row = static(model, some if mode == "static" else means, options, args, block, policy, mode)
            card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
            memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
            row |= {
                "cache_dtype": args.cache_dtype,
                "model": args.model,
                kind: value,
                "slots": args.slots,
                "requests": args.requests,
                "GiB": memory,
            }
            row |= {
                "dtype": args.dtype,
                "card": card,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            print(json.dumps(row), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
