"""`tp_plan="auto"`, in two processes on the CPU."""

import json
import re

import pytest
from torch import distributed

from ..builders import BUILDERS, new_model
from ..processes import in_two_processes
from .tensor_parallel import leave_outcomes

# GLADream's gates between its two scans read all heads together: its attention stays whole, its MLPs are divided.
LARGEST_SHARE = {"gla_dream": 0.9}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    root = tmp_path_factory.mktemp("families")
    for family in BUILDERS:
        new_model(family).save_pretrained(root / family)
    in_two_processes(leave_outcomes, root)
    return json.loads((root / "outcomes.json").read_text())


def test_two_processes_compute_what_one_does(family, outcomes):
    assert outcomes[family]["difference"] < 1e-4
    assert outcomes[family]["same_tokens"]


def test_no_process_decodes_on_kernels_or_graphs_that_know_nothing_of_the_others(family, outcomes):
    """On two GPUs, where they are possible: they would take a part of the heads for all of them."""
    assert outcomes[family]["takes_the_plain_path"]


def test_each_process_holds_its_part_of_the_weights(family, outcomes):
    assert 0.45 < outcomes[family]["share"] < LARGEST_SHARE.get(family, 0.65)


def test_the_plan_names_what_the_model_has(family, model):
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in [*model.named_modules(), *model.named_parameters()]}
    # Qwen3-MoE's plan, which is SDAR-MoE's, is also for the layers without experts that a configuration may ask for.
    dense = {f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")} if family == "sdar_moe" else set()
    assert set(model.tp_plan) - names == dense
