"""Data parallelism: what one process can feed, and a plan past these machines.

usage: scaling.py front     on a CPU: what a request and an event cost the process before the replicas
       scaling.py plan      the simulation: against what was measured, for 2 and 4 GPUs, and for 1 to 1,000

`data_parallel.py` measures what `plan` says of 1, 2 and 4 GPUs.

The simulation decodes requests step by step, with the rows, prompts and lengths of `serving_offline.py`. A step takes
FIXED + weights read once + tokens * (products + what goes with them) + columns * reading keys and values. The numbers are those
of one measured step of SDAR-4B on an H100 (docs/speed.md, "Requests in flight"); another model's follow from its sizes.
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "hub_configs"
BLOCK, SLOTS, BUDGET, MEAN_PROMPT, MEAN_NEW, SIGMA = 4, 128, 2048, 512, 256, 0.8
# A step of SDAR-4B of so many tokens and columns, in milliseconds: products, attention, what grows with tokens, the rest.
STEP = {"tokens": 1180, "columns": 83_000, "products": 12.8, "attention": 5.5, "by_token": 1.7, "fixed": 0.9}
BYTES_PER_MS = 3.0e9  # of a copy
# docs/speed.md: model, tokens a step, requests -> tokens a second.
MEASURED = {
    ("SDAR-4B", 1, 2048): 6590,
    ("SDAR-4B", 2, 2048): 10535,
    ("SDAR-4B", 4, 2048): 14785,
    ("SDAR-8B", 2, 1024): 6186,
}
# Milliseconds of one core, from `scaling.py front`: a request, and a block of it. Behind HTTP all are streams.
FRONT = {"generate": (0.51, 0.049), "stream": (0.36, 0.086), "http": (2.35, 0.209)}
DOLLARS_PER_HOUR = 2.5  # assumed: an H100, rented
STORAGE_BYTES_PER_SECOND = 10e9  # assumed: what one file system gives all machines together
HOURS_BETWEEN_FAILURES = 50_000  # of a GPU: 419 unexpected interruptions of 16,384 in 54 days, arXiv:2407.21783, 3.3.4


def lengths(requests: int, seed: int = 0) -> list[tuple[int, int]]:
    dice = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, min(4 * mean, round(dice.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA))))

    return [(length(MEAN_PROMPT), length(MEAN_NEW)) for _ in range(requests)]


def sizes(model: str) -> tuple[int, int, int]:
    """Weights of the layers, of the head, and the hidden size."""
    config = json.loads((CONFIGS / f"{model}-Chat/config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    heads = head * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    layer = hidden * heads + 3 * hidden * config["intermediate_size"]
    return layer * config["num_hidden_layers"], hidden * config["vocab_size"], hidden


def costs(model: str) -> tuple[float, float, float]:
    """Milliseconds of a step: of any, of each token, of each column that a row sees."""
    (base, base_head, base_hidden), (layers, head, hidden) = sizes("SDAR-4B"), sizes(model)
    reading = 2 * (base + base_head) / BYTES_PER_MS
    token = (STEP["products"] - reading) * (layers + head) / (base + base_head) + STEP[
        "by_token"
    ] * hidden / base_hidden
    fixed = STEP["fixed"] + 2 * (layers + head) / BYTES_PER_MS
    return fixed, token / STEP["tokens"], STEP["attention"] / STEP["columns"]


def decode(work: list[tuple[int, int]], tokens_per_step: float, cost: tuple[float, float, float]) -> float:
    """Seconds that a replica takes for requests that all wait."""
    fixed, by_token, by_column = cost
    waiting, rows, milliseconds = list(reversed(work)), [], 0.0
    steps_per_block = BLOCK / tokens_per_step
    while waiting or rows:
        while waiting and len(rows) < SLOTS:
            prompt, new = waiting.pop()
            rows.append([prompt, prompt, 0.0, math.ceil(new / BLOCK) * steps_per_block])  # left, seen, step, steps
        tokens = columns = 0
        budget = BUDGET
        for row in rows:
            if row[0]:
                piece = min(row[0], budget)
                row[0], budget = row[0] - piece, budget - piece
                tokens, columns = tokens + piece, columns + (row[1] if piece else 0)
                continue
            # A block's first step writes the block before as well.
            tokens += BLOCK if row[2] % steps_per_block else 2 * BLOCK
            row[2] += 1
            columns += row[1] + BLOCK * int(row[2] / steps_per_block)
        rows = [row for row in rows if row[2] < row[3]]
        milliseconds += fixed + by_token * tokens + by_column * columns
    return milliseconds / 1000


def parallel(model: str, tokens_per_step: float, requests: int, replicas: int) -> float:
    """Tokens a second of `LLM(data_parallel_size=replicas)`, as `Replicas` divides requests."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(replicas)]
    for each in lengths(requests):
        min(shares, key=lambda share: sum(map(sum, share))).append(each)
    seconds = max(decode(share, tokens_per_step, costs(model)) for share in shares)
    asked = sum(new for _, new in lengths(requests))
    by_request, by_event = FRONT["generate"]
    return asked / max(seconds, (requests * by_request + asked / BLOCK * by_event) / 1000)


def plan() -> None:
    for (model, tokens_per_step, requests), measured in MEASURED.items():
        found = parallel(model, tokens_per_step, requests, 1)
        print(
            f"{model} {tokens_per_step} a step: {found:,.0f} simulated, {measured:,} measured ({found / measured:.2f})"
        )
    one = parallel("SDAR-8B", 2, 768, 1)
    for replicas in (2, 4, 8):
        many = parallel("SDAR-8B", 2, 768 * replicas, replicas)
        print(f"SDAR-8B, {replicas} replicas, 768 requests each: {many:,.0f} simulated, {many / one:.2f} times one")
    for model in ("SDAR-4B", "SDAR-8B"):
        layers, head, _ = sizes(model)
        weights = 2 * (layers + 2 * head)  # with the embedding
        for tokens_per_step in (1, 2, 4):
            rate, cost = parallel(model, tokens_per_step, 1024, 1), costs(model)
            busy = ", ".join(
                f"{name} with {1000 / (by_request / MEAN_NEW + by_event / BLOCK) / rate:.1f}"
                for name, (by_request, by_event) in FRONT.items()
            )
            print(f"{model}, {tokens_per_step} a step; one core is busy with so many GPUs: {busy}")
            for gpus in (1, 8, 64, 1000):
                share = 1_000_000 // gpus
                part = min(share, 4096)
                seconds = decode(lengths(part), tokens_per_step, cost) + (share - part) * MEAN_NEW / rate
                loading = gpus * weights / STORAGE_BYTES_PER_SECOND
                hours = (seconds + loading) / 3600
                print(
                    f"  {gpus:5} GPUs: {gpus * rate:12,.0f} tokens a second; a million prompts in {hours:7.2f} h (loading "
                    f"{loading:.0f} s), ${gpus * hours * DOLLARS_PER_HOUR:,.0f}; ${DOLLARS_PER_HOUR / rate / 0.0036:.3f} a "
                    f"million tokens; a GPU fails every {HOURS_BETWEEN_FAILURES / gpus:,.0f} h"
                )


def front() -> None:
    """Time of this process alone: engines and clients run in others."""
    from serving_online import load, served, tiny, tokenizer_for

    from dllm_hf import LLM, SamplingParams

    def line(first: tuple[int, float], second: tuple[int, float]) -> tuple[float, float]:
        by_event = (second[1] - first[1]) / (second[0] - first[0])
        return first[1] - first[0] * by_event, by_event

    model, block, _ = tiny()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer_for(folder + "/none", model.config.vocab_size).save_pretrained(folder)
        options = {"denoising_steps": 1, "suppress_tokens": [model.config.eos_token_id]}
        prompts = [[(each + index) % 1000 for index in range(256)] for each in range(128)]
        with (
            LLM(folder, data_parallel_size=2, device="cpu", max_num_seqs=32, block_length=block) as llm,
            served(llm) as (port, _),
        ):
            found: dict[str, list] = {name: [] for name in FRONT}
            for _ in range(3):
                points: dict[str, list[tuple[int, float]]] = {name: [] for name in FRONT}
                for new in (8, 72):
                    params, begun = SamplingParams(max_tokens=new, options=options), time.process_time()
                    llm.generate(prompts, params, use_tqdm=False)
                    points["generate"].append((new // BLOCK, 1000 * (time.process_time() - begun) / len(prompts)))
                    params, begun = SamplingParams(max_tokens=new, options=options), time.process_time()
                    for _ in llm.generate_streaming(prompts, params):
                        pass
                    points["stream"].append((new // BLOCK, 1000 * (time.process_time() - begun) / len(prompts)))
                    bodies, begun = (
                        [{"prompt": each, "max_tokens": new, **options} for each in prompts],
                        time.process_time(),
                    )
                    results = load(port, bodies, clients=64)
                    points["http"].append((new // BLOCK, 1000 * (time.process_time() - begun) / len(prompts)))
                    assert not any(each["error"] for each in results), results[0]
                for name, (first, second) in points.items():
                    found[name].append(line(first, second))
            for name, values in found.items():
                request, event = (sorted(each)[1] for each in zip(*values))
                print(f"{name}: {request:.2f} ms of a core for a request of 256 tokens, {event:.3f} for an event")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("front", "plan"))
    {"front": front, "plan": plan}[parser.parse_args().mode]()


if __name__ == "__main__":
    main()
