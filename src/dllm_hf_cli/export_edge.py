"""`dllm-hf export-edge`."""

import argparse

import torch
from transformers.utils import logging

from dllm_hf.edge import export_model, load_hf_model
from dllm_hf.hub import checkpoint
from dllm_hf.runtimes.exporting import check_new

from .output import show, tell


def export_edge(arguments: argparse.Namespace) -> int:
    check_new(arguments.out)
    for name in ("rows", "columns", "block_length"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1.")
    logging.set_verbosity_error()
    folder = checkpoint.fetch(arguments.model)
    with checkpoint.failing_with(f"{folder} cannot be loaded"):
        model, _, config = load_hf_model(folder)
    columns = arguments.columns or min(config.max_position_embeddings, 512)
    tell(f"Lowering {config.num_hidden_layers} layers, which takes about ten seconds for each ...")
    inputs = (torch.zeros(arguments.rows, columns, dtype=torch.long),)
    quantization = None if arguments.quantization == "none" else arguments.quantization
    path = export_model(model, inputs, arguments.out, quantization, arguments.block_length)
    show(f"Written: {path}, {path.stat().st_size / 1e6:.1f} MB")
    return 0
