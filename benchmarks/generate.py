"""What a denoising step and a generated token cost on a GPU: every family, cache policy, batch and quota, beside the floor.

usage: generate.py measure --out results.jsonl [--weights fp8] [--models llada dream sdar sdar_moe llada2 llada_moe nemotron
                   fast_dllm_v2 gladream qwen3]
                   [--batches 1 8 32] [--strategy low_confidence_dynamic] [--cache-dtype int8]
       generate.py table results.jsonl

Random bf16 weights in the shapes of LLaDA-8B, Dream-7B, SDAR-8B, SDAR-30B-A3B, LLaDA2.0-mini (16B-A1B), LLaDA-MoE-7B-A1B,
Nemotron-Labs-Diffusion-8B, Fast-dLLM v2 7B and a GLADream of 1B; a prompt of 512 tokens and 256 new ones, each step transferring a fixed quota (with the strategy
`low_confidence_dynamic` also: its threshold of 1 is never exceeded, and the host looks after each step). The end of sequence is never proposed, so that every run
does the same work. `qwen3`, for comparison: an autoregressive Qwen3-8B in the `generate` of transformers, compiled, with a
static cache.

Floor: the model's matrix products alone, at as many rows as a step has, in a CUDA graph; of experts those that the steps
reach (`experts`: how many in a layer, counted in a call on the plain path). `step`: milliseconds of one step
more, from two calls that differ in the number of steps alone, so that the fixed cost of a block or a call is left out;
`on_device`: the median on the device of the passes that feed a block of each row and nothing else, which is the better figure where a
call is for the most part something else;
`mean`: milliseconds of a call divided by its forward passes. `first`: seconds by which a first call is longer than the
next.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from timing import captured, milliseconds, pass_times
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from transformers.quantizers.quantizers_utils import should_convert_module

import dllm_hf  # noqa: F401  registers the models
from dllm_hf.generation.configuration import CACHE_DTYPES
from dllm_hf.kernels.layers import quantize_rows
from dllm_hf.kernels.products import MAX_ROWS, few_rows_product
from dllm_hf.quantization import FORMATS, quantization_config

CONFIGS = Path(__file__).parents[1] / "hub_configs"
# Folder, changes to its configuration, block lengths.
MODELS = {
    "llada": ("LLaDA-8B-Instruct", {}, (32, 4)),
    "dream": ("Dream-v0-Instruct-7B", {}, (32, 4)),
    "sdar": ("SDAR-8B-Chat", {}, (4, 32)),
    "sdar_moe": ("SDAR-30B-A3B-Chat", {}, (4,)),
    "llada2": ("LLaDA2.0-mini", {}, (32,)),
    "llada_moe": ("LLaDA-MoE-7B-A1B-Instruct", {}, (32,)),
    "nemotron": ("Nemotron-Labs-Diffusion-8B", {}, (32,)),
    "fast_dllm_v2": ("Fast_dLLM_v2_7B", {}, (32,)),
    "gladream": (
        "GLADream",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 5632,
        },
        (32,),
    ),
}


def build(name: str, weights: str = "bf16"):
    folder, changes, _ = MODELS[name]
    config = AutoConfig.from_pretrained(CONFIGS / folder, **changes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if weights != "bf16":
        from torchao.quantization import quantize_

        asked = quantization_config(weights)
        converts = lambda module, name: (
            isinstance(module, torch.nn.Linear) and should_convert_module(name, asked.modules_to_not_convert)
        )
        quantize_(model, asked.quant_type, converts)
    return model


def product_of(weight, inputs: dict[int, torch.Tensor]):
    """A product with a weight as a function: in fp8 of inputs that are in fp8 already, in int8 by our kernel where it can."""
    x = inputs[weight.shape[1]]
    if type(weight).__name__ == "Float8Tensor":
        values, scales = quantize_rows(x)
        return lambda: torch._scaled_mm(
            values, weight.qdata.t(), scales, weight.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    if type(weight).__name__ == "Int8Tensor" and len(x) <= MAX_ROWS[torch.int8]:
        return lambda: few_rows_product(x, weight.qdata, weight.scale, None, torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, weight)


def experts_of(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if getattr(module, "gate_up_proj", torch.empty(0)).ndim == 3]


def reached_experts(model, rows: int, call) -> int:
    """How many experts of a layer a step reaches, the mean over the layers and the steps of a call on the plain path."""
    counts = []

    def count(_, inputs):
        states, chosen = inputs[:2]
        if len(states) == rows:
            counts.append(len(chosen.unique()))

    handles = [module.register_forward_pre_hook(count) for module in experts_of(model)]
    call()
    for handle in handles:
        handle.remove()
    return round(sum(counts) / len(counts))


@torch.no_grad()
def floor(model, rows: int, reached: int = 0) -> float:
    """Milliseconds of the model's matrix products at `rows` rows, of experts `reached` in each layer; quantised weights by
    [`product_of`]."""
    products = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        width: torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for width in {w.shape[1] for w in products}
    }
    multiply = [product_of(weight, inputs) for weight in products]
    experts = experts_of(model)
    if experts:
        number, chosen = len(experts[0].gate_up_proj), rows * model.config.num_experts_per_tok
        # The end of each expert's rows, which are spread evenly over those that are reached.
        ends = (torch.arange(1, number + 1, device="cuda").clamp(max=reached) * chosen // reached).to(torch.int32)
        grouped = [weight for module in experts for weight in (module.gate_up_proj, module.down_proj)]
        rows_of = {
            weight.shape[2]: torch.randn(chosen, weight.shape[2], device="cuda", dtype=torch.bfloat16)
            for weight in grouped
        }

    def run():
        for product in multiply:
            product()
        if experts:
            for weight in grouped:
                torch._grouped_mm(rows_of[weight.shape[2]], weight.transpose(1, 2), offs=ends)

    return milliseconds(captured(run))


def timed(call) -> tuple[float, object]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    output = call()
    torch.cuda.synchronize()
    return time.perf_counter() - began, output


def prompts(vocab: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocab - 1000, (batch, length), generator=torch.Generator().manual_seed(0)).cuda()


def run_setting(model, ids, options: dict, block: int, quotas: list[int]) -> tuple[float, dict]:
    """The seconds by which a first call is longer than a later one, and for each quota the seconds and forward passes of
    a call."""

    def seconds(quota: int) -> tuple[float, int]:
        took, output = timed(lambda: model.diffusion_generate(ids, denoising_steps=-(-block // quota), **options))
        return took, output.num_forward_passes

    model.release_graphs()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    # The first call compiles the kernels and captures the graphs, which all quotas share. Graphs are captured at a block's
    # third step: the first call needs a quota with so many.
    warm = max([quota for quota in quotas if block >= 3 * quota] or [min(quotas)])
    first = seconds(warm)[0]
    found = {quota: seconds(quota) for quota in quotas}
    return first - found[warm][0], found


def measure_family(name: str, args):
    """Yields a dict for each setting."""
    model, blocks = build(name, args.weights), MODELS[name][2]
    weights = torch.cuda.memory_allocated()
    end = model.generation_config.eos_token_id
    fixed = {"max_new_tokens": args.new, "eos_token_id": [], "return_dict_in_generate": True, "temperature": 0.0}
    fixed |= {"suppress_tokens": end if isinstance(end, list) else [] if end is None else [end]}
    fixed |= {"remasking_strategy": args.strategy, "confidence_threshold": 1.0}
    floors: dict[int, float] = {}
    reached: dict[int, int] = {}
    for block in args.blocks or blocks:
        for batch in args.batches:
            ids = prompts(model.config.vocab_size, batch, args.prompt)
            for policy in args.policies or model.cache_policies:
                for path in args.paths:
                    if path != "plain" and policy == "none":
                        continue
                    options = {
                        **fixed,
                        "block_length": block,
                        "cache_policy": policy,
                        "disable_compile": path == "plain",
                        "torch_compile": path == "compiled",
                        "cache_dtype": None if policy == "none" else args.cache_dtype,
                    }
                    with pass_times() as times:
                        first, found = run_setting(model, ids, options, block, args.quotas)
                    rows = batch * (args.prompt + args.new if policy == "none" else block)
                    if rows not in floors:
                        plain = {**options, "disable_compile": True, "torch_compile": False, "denoising_steps": block}
                        if experts_of(model):
                            reached[rows] = reached_experts(
                                model, rows, lambda ids=ids, plain=plain: model.diffusion_generate(ids, **plain)
                            )
                        floors[rows] = floor(model, rows, reached.get(rows, 0))
                    few, many = max(found), min(found)
                    step = None
                    if found[many][1] > found[few][1]:
                        step = 1000 * (found[many][0] - found[few][0]) / (found[many][1] - found[few][1])
                    for quota, (seconds, passes) in found.items():
                        yield {
                            "model": name,
                            "weights": args.weights,
                            "batch": batch,
                            "block": block,
                            "policy": policy,
                            "cache_dtype": options["cache_dtype"],
                            "path": path,
                            "quota": quota,
                            "passes": passes,
                            "mean": 1000 * seconds / passes,
                            "step": step,
                            "on_device": statistics.median(times[rows]) if times[rows] else None,
                            "floor": floors[rows],
                            "experts": reached.get(rows),
                            "tokens_per_second": batch * args.new / seconds,
                            "first": first,
                            "memory": (torch.cuda.max_memory_allocated() - weights) / 2**30,
                        }


def measure_autoregressive(args):
    """Qwen3-8B, whose shape is SDAR-8B's."""
    sdar = AutoConfig.from_pretrained(CONFIGS / "SDAR-8B-Chat").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    config = Qwen3Config(**{name: sdar[name] for name in names}, eos_token_id=None, pad_token_id=0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    weights = torch.cuda.memory_allocated()
    for batch in args.batches:
        ids = prompts(config.vocab_size, batch, args.prompt)
        torch.cuda.reset_peak_memory_stats()
        call = lambda ids=ids: model.generate(
            ids, max_new_tokens=args.new, do_sample=False, cache_implementation="static", eos_token_id=None
        )
        first, _ = timed(call)
        call()
        seconds, _ = timed(call)
        yield {
            "model": "qwen3",
            "batch": batch,
            "block": 1,
            "policy": "static",
            "path": "compiled",
            "quota": 1,
            "passes": args.new,
            "mean": 1000 * seconds / args.new,
            "step": None,
            "floor": floor(model, batch),
            "tokens_per_second": batch * args.new / seconds,
            "first": first - seconds,
            "memory": (torch.cuda.max_memory_allocated() - weights) / 2**30,
        }


def measure(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none.")
    blocks = args.blocks or [min(MODELS[name][2]) for name in args.models if name in MODELS] or [max(args.quotas)]
    if max(args.quotas) > min(blocks):
        sys.exit(f"--quotas {max(args.quotas)}: a step cannot transfer more than a block of {min(blocks)} has.")
    if args.policies == ["none"] and "plain" not in args.paths:
        sys.exit("--policies none has the path `plain` only: add it to --paths.")
    run = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    run |= {
        "date": time.strftime("%Y-%m-%d"),
        "prompt": args.prompt,
        "new": args.new,
        "command": " ".join(sys.argv[1:]),
    }
    for name in args.models:
        for found in measure_autoregressive(args) if name == "qwen3" else measure_family(name, args):
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**run, **found}) + "\n")
            print(line({**run, **found}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


COLUMNS = (
    "model",
    "prompt + new",
    "batch",
    "block",
    "policy",
    "path",
    "quota",
    "mean",
    "step",
    "on device",
    "floor",
    "step / floor",
    "tokens/s",
    "GiB",
    "first, s",
)


def line(row: dict) -> str:
    step = row["step"]
    if step is None and row["policy"] in ("none", "static"):
        step = row["mean"]  # without a policy all forward passes are alike
    weights = row.get("weights", "bf16")
    cells = [
        row["model"] if weights == "bf16" else f"{row['model']} {weights}",
        f"{row['prompt']} + {row['new']}",
        *(row[name] for name in COLUMNS[2:7]),
    ]
    if row.get("cache_dtype"):
        cells[4] += f", {row['cache_dtype']}"
    # With `prefix` the number of rows changes from block to block: no floor holds for all steps.
    least = None if row["policy"] == "prefix" else row["floor"]
    known = [row["mean"], step, least]
    cells += ["" if each is None else f"{each:.2f}" for each in (*known[:2], row.get("on_device"), least)]
    cells.append("" if None in known else f"**{step / least:.2f}**")
    cells += [f"{row['tokens_per_second']:.0f}", f"{row['memory']:.2f}", f"{row['first']:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(args: argparse.Namespace) -> None:
    rows = [json.loads(text) for text in args.results.read_text(encoding="utf-8").splitlines()]
    for name in ("device", "torch", "transformers", "date"):
        print(f"{name}: {', '.join(sorted({row[name] for row in rows}))}")
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print(line(row))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="run and append to a .jsonl file")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--models", nargs="+", choices=[*MODELS, "qwen3"], default=[*MODELS, "qwen3"])
    measuring.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    measuring.add_argument("--quotas", nargs="+", type=int, default=[1, 2, 4], help="tokens that a step transfers")
    measuring.add_argument("--blocks", nargs="+", type=int, help="block lengths; the model's own if not given")
    measuring.add_argument("--policies", nargs="+", help="cache policies; all of the model's if not given")
    measuring.add_argument("--paths", nargs="+", choices=["fast", "plain", "compiled"], default=["fast", "plain"])
    measuring.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="of keys and values; the model's own if not given"
    )
    strategies = ["low_confidence_static", "low_confidence_dynamic"]
    measuring.add_argument("--strategy", choices=strategies, default=strategies[0])
    formats = ["bf16", *FORMATS]
    measuring.add_argument("--weights", choices=formats, default="bf16", help="as `dllm-hf quantize` makes them")
    measuring.add_argument("--prompt", type=int, default=512)
    measuring.add_argument("--new", type=int, default=256)
    measuring.set_defaults(run=measure)
    printing = commands.add_parser("table", help="print a table")
    printing.add_argument("results", type=Path)
    printing.set_defaults(run=table)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
