"""`dllm-hf export-gguf`."""

import argparse

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dllm_hf.hub import checkpoint
from dllm_hf.runtimes.exporting import check_new
from dllm_hf.runtimes.gguf_export import export_gguf as export_model

from .output import show


def export_gguf(arguments: argparse.Namespace) -> int:
    check_new(arguments.out)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = checkpoint.fetch(arguments.model)
    checkpoint.read_json(folder / "config.json")
    checkpoint.checked_weights(folder, checkpoint.empty_model(folder))
    with checkpoint.failing_with(f"{folder} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    show(f"Written: {export_model(model, arguments.out, arguments.type)}")
    return 0
