"""The server under load, beside the engine alone.

usage: serving_online.py --model sdar-4b [--requests 1024] [--slots 128] [--tokens-per-step 2] [--out rows.jsonl]
       serving_online.py --model hub_configs/sdar-tiny-shakespeare --requests 96 --slots 16 --mean-prompt 64 --mean-new 32
       serving_online.py --model tiny --modes storm --clients 200 --seconds 60

Models, prompts and lengths are those of `serving_offline.py`; `tiny` is a random SDAR of two layers. A checkpoint without a
tokenizer gets one whose tokens are words. The server runs in this process, its clients in another one.

offline: `LLM.generate` on all requests. closed: as many clients as slots, each sends a request when its last one has ended.
poisson: arrivals at `--loads` times the rate at which offline finished requests. of_offline: tokens a second over those of
offline in the same run (closed; poisson is bounded by its arrivals). first, latency: seconds from the request to the first
text and to the end, percentiles 50, 95, 99. agrees: streams whose text is that of offline, of all; in float32 all must.

storm: `--clients` streams at a time for `--seconds`, of which a third disconnects at a random moment: errors that nobody asked
for, columns and rows in use afterwards, the slowest answer of /health, and the process's memory in MiB after a quarter of the
time and at the end.
"""

import argparse
import http.client
import json
import resource
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
import uvicorn
from serving_offline import DEVICE, build, engine_for, percentiles, workload
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dllm_hf import LLM, SamplingParams, SDARConfig, SDARForCausalLM
from dllm_hf.generation.configuration import as_token_list
from dllm_hf.serving import Settings, bind, create_app

CLIENTS = Path(__file__).with_name("http_load.py")


def tokenizer_for(name: str, vocab: int):
    if Path(name).is_dir():
        return AutoTokenizer.from_pretrained(name)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", clean_up_tokenization_spaces=False)


def tiny():
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 512, "block_size": 4}
    ends = {"mask_token_id": 1023, "eos_token_id": 1022, "pad_token_id": 1022, "bos_token_id": None}
    return SDARForCausalLM(SDARConfig(**sizes, **ends, initializer_range=0.3)).eval().float(), 4, "block"


@contextmanager
def served(llm: LLM):
    app = create_app(llm, Settings("model", request_timeout=3600.0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1], app.state.api
        finally:
            server.should_exit = True
            thread.join()


def load(port: int, bodies: list[dict], **job) -> list[dict]:
    """What became of the requests."""
    job = {"host": "127.0.0.1", "port": port, "requests": bodies, "clients": 1, "rate": None, "seconds": None, **job}
    job = {"leaving": 0.0, "patience": 1.0, "seed": 0, **job}
    command = [sys.executable, str(CLIENTS)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def figures(mode: str, results: list[dict], texts: list[str]) -> dict:
    good = [each for each in results if each["error"] is None]
    seconds = max(each["end"] for each in results)
    return {
        "mode": mode,
        "seconds": seconds,
        "tokens_per_second": sum(each["tokens"] for each in good) / seconds,
        "first": percentiles([each["first"] - each["begin"] for each in good]),
        "latency": percentiles([each["end"] - each["begin"] for each in good]),
        "errors": len(results) - len(good),
        "agrees": f"{sum(each['text'] == texts[each['number']] for each in good)} of {len(results)}",
    }


def measure(llm: LLM, work, options: dict, args) -> list[dict]:
    """Each mode on the same engine, the offline one before and after the others; the better of both counts."""
    prompts = [prompt for prompt, _ in work]
    params = [SamplingParams(max_tokens=new, seed=0, options=options) for _, new in work]
    few = slice(0, 3 * args.slots)
    llm.generate(prompts[few], params[few], use_tqdm=False)  # graphs are captured

    def offline() -> tuple[float, int, list[str]]:
        begun = time.perf_counter()
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        seconds = time.perf_counter() - begun
        return seconds, sum(len(each.token_ids) for each in outputs), [each.text for each in outputs]

    seconds, tokens, texts = offline()
    bodies = [{"prompt": prompt, "max_tokens": new, "seed": 0, **options} for prompt, new in work]
    rows = []
    with served(llm) as (port, _):
        load(port, bodies[few], clients=args.slots)
        if "closed" in args.modes:
            rows.append(figures("closed", load(port, bodies, clients=args.slots), texts))
        if "poisson" in args.modes:
            for part in args.loads:
                rate = part * len(work) / seconds
                rows.append({**figures("poisson", load(port, bodies, rate=rate), texts), "load": part, "rate": rate})
        # Nobody else reads events now: the server's thread waits.
        seconds = min(seconds, offline()[0])
    rows.insert(0, {"mode": "offline", "seconds": seconds, "tokens_per_second": tokens / seconds})
    for row in rows:
        row["of_offline"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def memory() -> float:
    """MiB of this process that are in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def storm(llm: LLM, work, options: dict, args) -> dict:
    bodies = [{"prompt": prompt, "max_tokens": new, "seed": 0, **options} for prompt, new in work]
    waits, sizes = [], []
    with served(llm) as (port, api):
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.1):
                begun, connection = time.perf_counter(), http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/health")
                assert connection.getresponse().status == 200
                connection.close()
                waits.append(time.perf_counter() - begun)
                sizes.append(memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        results = load(port, bodies, clients=args.clients, seconds=args.seconds, leaving=1 / 3, patience=2.0)
        is_over.set()
        watcher.join()
        end = time.monotonic() + 10
        while time.monotonic() < end and not llm._driver.engine.is_idle:
            time.sleep(0.05)
        left = llm.load()
    wrong = [each["error"] for each in results if each["error"] not in (None, "left")]
    return {
        "mode": "storm",
        "clients": args.clients,
        "seconds": args.seconds,
        "finished": sum(each["error"] is None for each in results),
        "left": sum(each["error"] == "left" for each in results),
        "errors": len(wrong),
        "first_errors": wrong[:3],
        "rows_in_use": left.running + left.waiting,
        "cache_in_use": left.cache,
        "health_worst": max(waits),
        "MiB_at_a_quarter": sizes[len(sizes) // 4],
        "MiB_at_the_end": sizes[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="tiny, a model of serving_offline.py, or a checkpoint")
    parser.add_argument("--out", type=Path, help="a file to add the rows to")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--budget", type=int, default=2048, help="columns of prompts and canvases in a step")
    parser.add_argument("--mean-prompt", type=int, default=512)
    parser.add_argument("--mean-new", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["closed", "poisson"], choices=["closed", "poisson", "storm"])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--clients", type=int, default=200, help="storm: streams at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="storm: how long")
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, block, policy = tiny() if args.model == "tiny" else build(args.model, getattr(torch, args.dtype))
    mask = model.config.mask_token_id  # would be filled
    work = [
        ([each * (each != mask) for each in prompt], new) for prompt, new in workload(args, model.config.vocab_size)
    ]
    size = block or model.default_block_length or 32
    ends = as_token_list(model.generation_config.eos_token_id)
    options = {"temperature": 0.0, "denoising_steps": -(-size // args.tokens_per_step)}
    options |= {"eos_token_id": [], "suppress_tokens": ends}
    more = {"tokenizer": tokenizer_for(args.model, model.config.vocab_size)}
    if DEVICE == "cpu":  # room for all slots, as on a GPU: nobody waits for columns
        more["num_cache_tokens"] = args.slots * (max(len(prompt) + new for prompt, new in work) + 34)
    llm = engine_for(model, work, args, block, policy, **more)
    rows = measure(llm, work, options, args) if set(args.modes) & {"closed", "poisson"} else []
    rows += [storm(llm, work, options, args)] if "storm" in args.modes else []
    for row in rows:
        row |= {"model": args.model, "slots": args.slots, "requests": args.requests, "dtype": args.dtype}
        row |= {"card": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"}
        row |= {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps(row), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
