"""What each of two processes does: each model of a folder whole and in two parts, the outcome as JSON."""

import json
from pathlib import Path

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


def leave_outcomes(root: Path) -> None:
    outcomes = {folder.name: compare(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    if distributed.get_rank() == 0:
        (root / "outcomes.json").write_text(json.dumps(outcomes))
