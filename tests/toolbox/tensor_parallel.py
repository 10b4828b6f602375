"""Run by `torchrun` in several processes: each model of a folder whole and in parts, the outcome as JSON.

torchrun --nproc-per-node 2 -m tests.toolbox.tensor_parallel FOLDER
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import dllm_hf  # registers the families
from dllm_hf.generation import graphs, mixin

from ..builders import left_pad
from ..generation.recorded_graphs import ROWS, Recorded
from .conftest import logits_of

SAMPLES = {"temperature": 0.8, "remasking_strategy": "low_confidence_static"}
CALLS = [
    *({"remasking_strategy": name} for name in dllm_hf.STRATEGIES),
    *({**SAMPLES, "remasking_strategy": name} for name in ("entropy", "topk_margin", "random", "factor")),
    {**SAMPLES, "top_k": 5, "top_p": 0.9},
    {**SAMPLES, "suppress_tokens": [3, 40, 63], "confidence_suppress_tokens": [7]},
    {**SAMPLES, "alg_temp": 0.5, "cfg_scale": 0.7, "num_return_sequences": 2},
]


@contextmanager
def fast_path():
    before = mixin.are_possible, graphs.capture
    mixin.are_possible, graphs.capture = (lambda device: True), Recorded
    try:
        yield
    finally:
        mixin.are_possible, graphs.capture = before


def decode(model, seed: int | None = 0, **options) -> list[list[int]]:
    """`seed`: None draws from PyTorch's own generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    options = {"denoising_steps": 3, "max_new_tokens": 9, "block_length": 4, **options}
    return model.diffusion_generate(**left_pad(ROWS), generator=generator, **options).tolist()


def differing_calls(whole, parts) -> list[str]:
    """The calls in which a model in parts gives other tokens than the whole one, on either path."""
    found = []
    for number, call in enumerate(CALLS):
        policies = whole.cache_policies if number % 4 == 0 else whole.cache_policies[-1:]
        for policy in policies if not hasattr(whole.config, "block_size") else whole.cache_policies[:1]:
            options = {**call, "cache_policy": policy}
            expected = decode(whole, **options)
            ways = {"plain": decode(parts, **options)}
            with fast_path():
                ways |= {"captured": decode(parts, **options), "replayed": decode(parts, **options)}
            found += [f"{way} {options}" for way, tokens in ways.items() if tokens != expected]
    return found


def compare(folder: Path) -> dict:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    parts = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    local = sum(
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        for parameter in parts.parameters()
    )
    return {
        "share": local / sum(parameter.numel() for parameter in whole.parameters()),
        "difference": float((logits_of(parts) - logits_of(whole)).abs().max()),
        "differing_calls": differing_calls(whole, parts),
        "is_fused": type(parts.step_forward()).__name__.startswith("Fused"),
    }


def main(root: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {folder.name: compare(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    if distributed.get_rank() == 0:
        (root / "outcomes.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
