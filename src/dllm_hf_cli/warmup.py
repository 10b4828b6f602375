"""`dllm-hf warmup`."""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from dllm_hf import LLM, SamplingParams
from dllm_hf.generation.graphs import are_possible
from dllm_hf.hub import checkpoint

from .options import generation_options
from .output import show
from .session import checked_device

PROMPTS, BATCHES = (5, 100, 700), (1, 4, 16)


def warmup(arguments: argparse.Namespace) -> int:
    """Decode a little with two layers of random weights, whose shapes are all that kernels depend on."""
    device = checked_device(arguments.device)
    if not are_possible(device):
        raise ValueError(f"Decoding on {device} compiles no kernels: there is nothing to warm up.")
    from triton import knobs

    logging.set_verbosity_error()
    folder = checkpoint.fetch(arguments.model, weights=False, code=arguments.trust_remote_code)
    began, cache = time.perf_counter(), Path(knobs.cache.dir)
    before = count(cache)
    model = two_layers(folder, arguments, device)
    options = generation_options(arguments)
    block = options.pop("block_length", None) or model.default_block_length or 32
    drafts = options.pop("draft_steps", None)
    strategies = [None, "low_confidence_static"] if drafts else [None]
    longest = model.config.max_position_embeddings
    prompts: list[Any] = [[0] * length for length in PROMPTS if length + 2 * block < longest]
    room = {"max_num_seqs": max(BATCHES), "max_model_len": min(longest, PROMPTS[-1] + 2 * block)}
    for policy in model.cache_policies:
        if policy == "none":  # runs without our kernels
            continue
        for rows, prompt, strategy in product(BATCHES, prompts, strategies):
            model.diffusion_generate(
                torch.tensor([prompt] * rows),
                max_new_tokens=2 * block,
                block_length=block,
                cache_policy=policy,
                denoising_steps=min(block, 4),
                **({"remasking_strategy": strategy, "draft_steps": drafts} if strategy else {}),
                **options,
            )
        model.release_graphs()
        llm = LLM(model, block_length=block, cache_policy=policy, draft_steps=drafts, **room, **options)
        for many, strategy in product((prompts, 6 * prompts), strategies):
            params = SamplingParams(max_tokens=2 * block, ignore_eos=True, remasking_strategy=strategy)
            llm.generate(many, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    show(f"{count(cache) - before} kernels compiled in {seconds:.1f} s into {cache}")
    return 0


def two_layers(folder: Path, arguments: argparse.Namespace, device: torch.device) -> Any:
    """A model of a checkpoint's shapes and formats, without its weights."""
    checkpoint.read_json(folder / "config.json")
    with checkpoint.failing_with(f"{folder / 'config.json'} describes no model that can be built"):
        trust = arguments.trust_remote_code
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        config.num_hidden_layers = min(config.num_hidden_layers, 2)
        dtype = (config.dtype or torch.float32) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust).eval()
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        from torchao.quantization import quantize_
        from transformers import TorchAoConfig

        asked = TorchAoConfig.from_dict(dict(quantization))
        kept = ["lm_head"] if asked.modules_to_not_convert is None else asked.modules_to_not_convert
        converts = lambda module, name: isinstance(module, torch.nn.Linear) and should_convert_module(name, kept)
        quantize_(model, asked.quant_type, converts)
    return model


def count(cache: Path) -> int:
    """Kernels in Triton's cache."""
    return sum(1 for _ in cache.glob("*/*.cubin"))
