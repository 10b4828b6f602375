"""What each of several processes does that divide models between them: it decodes with the whole model and with its part."""

import json
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dllm_hf import LLM, STRATEGIES, SamplingParams
from dllm_hf.engine import engine
from dllm_hf.engine.worker import load_part
from dllm_hf.fused import shared_sums
from dllm_hf.generation import graphs, mixin
from dllm_hf.generation.divided_head import VocabularyPart

from ..builders import BUILDERS, left_pad
from ..generation.recorded_graphs import DEVICE, ROWS, Recorded
from ..toolbox.conftest import TOKENS

# By the number of processes.
FAMILIES: dict[int, tuple[str, ...]] = {2: tuple(BUILDERS), 4: ("dream", "sdar_moe", "llada", "sdar", "gla_dream")}
SAMPLES = {"temperature": 0.8, "remasking_strategy": "low_confidence_static"}
# What a step over rows with different options does not do: guidance, one draw for all rows, and each strategy for itself.
CALLS = [
    *({"remasking_strategy": name} for name in STRATEGIES),
    *({"remasking_strategy": name, "draft_steps": 2} for name in ("low_confidence_static", "origin")),
    *({**SAMPLES, "remasking_strategy": name} for name in ("entropy", "topk_margin", "random", "factor")),
    {**SAMPLES, "top_k": 5, "top_p": 0.9},
    {**SAMPLES, "suppress_tokens": [3, 40, 63], "confidence_suppress_tokens": [7]},
    {**SAMPLES, "alg_temp": 0.5, "cfg_scale": 0.7, "num_return_sequences": 2},
]
# Of several requests at once: every strategy, sampled or not, some with filters.
REQUESTS = [
    SamplingParams(
        remasking_strategy=name, temperature=temperature, topk=topk, seed=number, ignore_eos=True, max_tokens=9
    )
    for number, name in enumerate(STRATEGIES)
    for temperature, topk in ((0.0, None), (0.8, 5 if number % 3 == 0 else None))
]


@contextmanager
def recorded_graphs():
    """On a CPU, what stands for graphs."""
    before = mixin.are_possible, engine.are_possible, graphs.capture
    mixin.are_possible = engine.are_possible = lambda device: True
    graphs.capture = Recorded
    try:
        yield
    finally:
        mixin.are_possible, engine.are_possible, graphs.capture = before


def graphs_on() -> object:
    return nullcontext() if DEVICE == "cuda" else recorded_graphs()


def of_all(tokens: list) -> list:
    """What every process has come to."""
    every: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, tokens)
    assert every == [tokens] * len(every)
    return tokens


def is_left_to_the_first(model) -> bool:
    """What the whole model gives only the first process compares with."""
    return not model.tp_size and os.environ["RANK"] != "0"


def decode(model, **options) -> list[list[int]]:
    if is_left_to_the_first(model):
        return []
    inputs = {name: tensor.to(model.device) for name, tensor in left_pad(ROWS).items()}
    options = {"denoising_steps": 3, "max_new_tokens": 9, "block_length": 4, **options}
    torch.manual_seed(int(os.environ["RANK"]) if model.tp_size else 0)  # the first process draws for all
    tokens = model.diffusion_generate(**inputs, **options).tolist()
    return of_all(tokens) if model.tp_size else tokens


def serve(model, policy: str, uses_graphs: bool) -> list[list[int]]:
    if is_left_to_the_first(model):
        return []
    options = {"cache_policy": policy, "block_length": 4, "draft_steps": 2}
    llm = LLM(model, max_num_seqs=6, enforce_eager=not uses_graphs, **options)
    outputs = llm.generate([[5 + number, 6, 7] for number in range(len(REQUESTS))], REQUESTS, use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return of_all(tokens) if model.tp_size else tokens


def differences(whole, part, calls: list[dict]) -> list[str]:
    """What a model in parts decodes to other tokens than the whole one."""
    found = []
    if whole.supports_editing:
        calls = [*calls, {"remasking_strategy": "low_confidence_dynamic", "editing_threshold": 0.05}]
    policies = whole.cache_policies
    for number, call in enumerate(calls):
        call = {**call, "cache_policy": policies[-1 - number % len(policies)]}
        expected = decode(whole, disable_compile=True, **call)
        with graphs_on():
            ways = {"graphs": decode(part, **call), "no graphs": decode(part, disable_compile=True, **call)}
        found += [f"{way}: {call}" for way, tokens in ways.items() if tokens != expected]
    for cache_dtype in whole.cache_dtypes:  # sums that are rounded otherwise may put a number on the other side
        call = {"cache_dtype": cache_dtype, "cache_policy": "block" if "block" in policies else "dual"}
        expected = decode(whole, disable_compile=True, **call)
        with graphs_on():
            pairs = [pair for rows in zip(decode(part, **call), expected) for pair in zip(*rows)]
        if sum(one != other for one, other in pairs) > len(pairs) / 10:
            found.append(f"keys and values in {cache_dtype}: {pairs}")
    for policy in policies:
        with graphs_on():
            if serve(part, policy, True) != serve(whole, policy, False):
                found.append(f"several requests at once: {policy}")
    return found


def gathers(part) -> list[bool]:
    """Whether the logits of all processes are put together: for a greedy call, a sampled one, and one with a filter."""
    found, plain = [], VocabularyPart.gather
    policy = (
        "block" if "block" in part.cache_policies else "dual"
    )  # not `none`, where the library's forward pass gathers them
    for options in ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 5}):
        with graphs_on(), patch.object(VocabularyPart, "gather", autospec=True, side_effect=plain) as gather:
            decode(part, **options, denoising_steps=2, remasking_strategy="entropy", cache_policy=policy)
        found.append(gather.called)
    return found


def refusal(model, **options) -> str | None:
    try:
        decode(model, **options)
    except ValueError as error:
        return str(error)
    return None


def says_stop_in_the_first(ids, scores, **_) -> bool:
    return os.environ["RANK"] == "0"


def calls_of_torchrun(folder: Path, whole) -> dict:
    """What `diffusion_generate` does where each process has loaded the model by the library's own argument."""
    part = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    options = {"remasking_strategy": "low_confidence_static"}
    stops = {**options, "stopping_criteria": [says_stop_in_the_first]}
    if (refused := refusal(part, **options)) is not None:
        return {"refused": refused}
    everywhere = decode(whole, **options, stopping_criteria=[lambda ids, scores, **_: True])
    found = {
        "refused": None,
        "same": decode(part, **options) == decode(whole, **options),
        "differing": refusal(part, **options, max_new_tokens=9 + int(os.environ["RANK"])),
        "stopped": decode(part, **stops) == everywhere != decode(whole, **options),
    }
    part.release_graphs()
    return found


def compare(folder: Path, number: int, rank: int, size: int) -> dict:
    if number % 2:  # sums of few tokens are computed like those of many
        shared_sums.PUSHED.clear()
    part = load_part(str(folder), rank, size, torch.float32, False)
    whole = AutoModelForCausalLM.from_pretrained(folder).to(part.device)
    local = sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in part.parameters())
    with torch.no_grad():
        logits, expected = (model(input_ids=TOKENS.to(part.device)).logits for model in (part, whole))
    found = {
        "share": local / sum(each.numel() for each in whole.parameters()),
        "difference": float((logits - expected).abs().max() / expected.abs().max()),
        # Each family gets other calls, in four processes, where a call costs more, fewer and other ones.
        "differences": differences(whole, part, CALLS[(number + size) % 5 :: 5 * size // 2]),
        "gathers": gathers(part),
        "torchrun": calls_of_torchrun(folder, whole),
        "is_fused": type(part.step_forward()).__name__.startswith("Fused"),
    }
    part.release_graphs()  # NCCL waits for those that use a group before it ends it
    return found


def run_rank(root: Path, rank: int, size: int, families: list[str]) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    store = f"file://{root / f'store-{size}'}"
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    numbers = {family: FAMILIES[size].index(family) for family in families}
    outcomes = {family: compare(root / family, number, rank, size) for family, number in numbers.items()}
    if rank == 0:
        (root / f"outcomes-{size}.json").write_text(json.dumps(outcomes))
    distributed.barrier()
    distributed.destroy_process_group()
