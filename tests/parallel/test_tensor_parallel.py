"""Models divided between processes. Of two heads of keys and values each is in two of four processes."""

import re

import pytest

from ..builders import BUILDERS, new_model
from .ranks import FAMILIES

# GLADream's gates between its two scans read all heads together: its attention stays whole, its MLPs are divided.
# LLaDA2's plan leaves its attention out.
ATTENTION = {"gla_dream": 0.5}
# More processes than heads of keys and values.
CUT = [(4, family) for family in ("dream", "sdar", "sdar_moe")]


@pytest.fixture(
    params=[(size, family) for size, families in FAMILIES.items() for family in families],
    ids=lambda param: "{}-{}".format(*param),
)
def outcome(request, outcomes_of) -> dict:
    size, family = request.param
    return {"size": size, "family": family, **outcomes_of(size)[family]}


@pytest.mark.slow
def test_processes_compute_together_what_one_does(outcome):
    assert outcome["difference"] < 1e-5


@pytest.mark.slow
def test_every_strategy_gives_the_tokens_of_one_process(outcome):
    assert outcome["is_fused"] and outcome["differences"] == []


@pytest.mark.slow
def test_each_process_holds_its_part_of_the_weights(outcome):
    least = 1 / outcome["size"]
    assert 0.9 * least < outcome["share"] < least + ATTENTION.get(outcome["family"], 0.2)


@pytest.mark.slow
def test_only_a_filter_needs_the_logits_of_the_whole_vocabulary(outcome):
    assert outcome["gathers"] == [False, False, True]


@pytest.mark.slow
def test_where_each_process_loads_its_part_calls_give_the_same_or_are_refused_before_one_waits_for_another(outcome):
    """`from_pretrained(..., tp_plan="auto")`: calls that differ, and heads that the plan would cut; the first says when to stop."""
    found = outcome["torchrun"]
    if (outcome["size"], outcome["family"]) in CUT:
        assert re.search("2 heads of keys and values cannot .* 4 processes: .*tensor_parallel_size", found["refused"])
    else:
        assert (found["refused"], found["same"], found["stopped"]) == (None, True, True)
        assert "their calls differ: every process must" in found["differing"]


@pytest.mark.parametrize("family", BUILDERS)
def test_the_plan_names_what_the_model_has(family):
    model = new_model(family)
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in [*model.named_modules(), *model.named_parameters()]}
    # Qwen3-MoE's plan, which is SDAR-MoE's, is also for the layers without experts that a configuration may ask for.
    dense = {f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")} if family == "sdar_moe" else set()
    assert set(model.tp_plan) - names == dense
