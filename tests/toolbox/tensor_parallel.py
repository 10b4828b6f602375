"""Run by `torchrun` in two processes: each model of a folder whole and in two parts, the outcome as JSON.

torchrun --nproc-per-node 2 -m tests.toolbox.tensor_parallel FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import dllm_hf  # noqa: F401  registers the families

from .conftest import decoded, logits_of


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
        "same_tokens": decoded(parts) == decoded(whole),
        "takes_the_plain_path": parts.step_forward() is None,
    }


def main(root: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {folder.name: compare(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    if distributed.get_rank() == 0:
        (root / "outcomes.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
