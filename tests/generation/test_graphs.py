"""The fast path gives what the plain path gives."""

import copy

import pytest
import torch

from dllm_hf.generation.backend import ModelBackend
from dllm_hf.generation.remasking import STRATEGIES
from dllm_hf.generation.window import steps_after

from ..test_golden import CASES, check_case, load_model
from .recorded_graphs import DEVICE, ROWS, both_ways, fresh_model

pytestmark = pytest.mark.usefixtures("captured")

POLICIES = [(family, policy) for family in ("llada", "dream") for policy in ("prefix", "dual")]
POLICIES += [("sdar", "block"), ("sdar_moe", "block"), ("gla_dream", "block")]
POLICIES += [("nemotron_diffusion", "block"), ("fast_dllm_v2", "block")]
# Each policy, and the families that have steps of their own, for what steps of all families do by the same code.
FEW = [("llada", "prefix"), ("dream", "dual"), ("sdar", "block"), ("gla_dream", "block"), ("fast_dllm_v2", "block")]
# Of each original, the first case of each strategy, of each policy, and of a padded batch: the others are slow tests.
DECODED, seen = [], set()
for folder, case in CASES:
    if case["kind"] != "logits":
        options = [(name, case["call"].get(name)) for name in ("alg", "remasking_strategy", "cache_policy")]
        options += [(name, name in case["call"]) for name in ("editing_threshold", "use_block_cache")]
        kinds = {(folder, *option) for option in [*options, ("padded", "attention_mask" in case["inputs"])]}
        marks = [pytest.mark.slow] if kinds <= seen else []
        DECODED.append(pytest.param(folder, case, id=f"{folder.name}-{case['id']}", marks=marks))
        seen |= kinds
# Each strategy with two or three policies, each policy with three or four strategies: the others are slow tests.
STRATEGY_CELLS = [
    pytest.param(*policy, strategy, marks=[pytest.mark.slow] if (row + column) % 3 else [])
    for row, policy in enumerate(POLICIES)
    for column, strategy in enumerate(STRATEGIES)
]


@pytest.mark.parametrize(
    "family, policy",
    [
        ("llada", "dual"),
        ("dream", "dual"),
        *((family, "block") for family in ("sdar", "nemotron_diffusion", "fast_dllm_v2")),
    ],
)
def test_the_first_pass_foresees_in_which_runs_attention_reads_the_steps(family, policy, monkeypatch):
    windows, run = [], ModelBackend.__call__

    def noted(backend, tokens, window, state):
        if backend.fused is not None:
            for each in [] if windows else steps_after(window):  # they can be run
                backend.fused(tokens[: len(each.columns)], each, copy.deepcopy(state))
            windows.append(window)
        return run(backend, tokens, window, state)

    monkeypatch.setattr(ModelBackend, "__call__", noted)
    options = {
        "max_new_tokens": 12,
        "block_length": 4,
        "cache_policy": policy,
        "remasking_strategy": "low_confidence_static",
    }
    both_ways(fresh_model(family), [[5] * 20] * 2, **options)
    kinds = lambda every: {(len(each.runs), each.longest, each.keep.shape) for each in every}
    assert kinds(windows[1:]) <= kinds([windows[0], *steps_after(windows[0])])
    assert len(kinds(windows)) > 1


@pytest.mark.parametrize("folder, case", DECODED)
def test_golden_cases_hold(folder, case):
    model = load_model(folder)
    model = copy.deepcopy(model).to(DEVICE) if DEVICE == "cuda" else model
    check_case(model, folder, case)
    check_case(model, folder, case)  # with the graphs of the first time


@pytest.mark.parametrize("family, policy, strategy", STRATEGY_CELLS)
def test_every_strategy_with_every_policy(family, policy, strategy, captured):
    options = {"denoising_steps": 3} if STRATEGIES[strategy].schedule == "timestep" else {}
    both_ways(
        fresh_model(family),
        max_new_tokens=8,
        block_length=4,
        cache_policy=policy,
        remasking_strategy=strategy,
        confidence_threshold=0.5,
        seeds=0,
        **options,
    )
    assert captured


@pytest.mark.gpu
@pytest.mark.parametrize("family, policy", [("sdar_moe", "block"), ("llada2", "block"), ("llada_moe", "dual")])
def test_steps_of_experts_are_captured_in_bfloat16(family, policy, captured):
    model, prompt = fresh_model(family).bfloat16(), torch.tensor([ROWS[0]], device=DEVICE)
    model.diffusion_generate(prompt, max_new_tokens=12, block_length=4, cache_policy=policy)
    assert captured


@pytest.mark.parametrize("cell, seeds", zip(FEW, [3, [3, 4, 5], [3, 4, 5], 3, 3]), ids=str)
def test_sampling_draws_the_same_numbers(cell, seeds):
    family, policy = cell
    options = {"temperature": 0.8, "top_k": 20, "alg_temp": 0.5, "remasking_strategy": "maskgit_plus"}
    both_ways(
        fresh_model(family),
        max_new_tokens=12,
        block_length=4,
        cache_policy=policy,
        denoising_steps=3,
        seeds=seeds,
        **options,
    )


@pytest.mark.parametrize("family, policy", FEW)
def test_guidance(family, policy):
    both_ways(fresh_model(family), max_new_tokens=8, block_length=4, cache_policy=policy, cfg_scale=0.7)


def test_edited_tokens(captured):
    editing = {"editing_threshold": 0.05, "max_post_steps": 3, "remasking_strategy": "low_confidence_dynamic"}
    both_ways(fresh_model("llada2"), max_new_tokens=12, block_length=4, confidence_threshold=0.3, **editing)
    assert captured


@pytest.mark.parametrize("family, policy", FEW)
def test_suppressed_tokens_and_ends_of_sequence(family, policy):
    model = fresh_model(family)
    options = {"max_new_tokens": 12, "block_length": 4, "cache_policy": policy, "denoising_steps": 2}
    common = both_ways(model, **options).sequences[:, 7:].flatten().bincount().argmax().item()
    assert not (both_ways(model, suppress_tokens=[common], **options).sequences[:, 7:] == common).any()
    both_ways(model, confidence_suppress_tokens=[common], **options)
    both_ways(model, eos_token_id=[common], **options)


@pytest.mark.parametrize("family, policy", FEW)
def test_calls_of_other_lengths_share_graphs_and_do_not_disturb_each_other(family, policy, captured):
    model, numbers = fresh_model(family), []
    options = {"block_length": 4, "cache_policy": policy, "denoising_steps": 2}
    for _ in range(3):
        both_ways(model, **options, max_new_tokens=8)
        both_ways(model, rows=[row[::-1] for row in ROWS], **options, max_new_tokens=12)
        both_ways(model, rows=ROWS[:2], **options, max_new_tokens=4)
        numbers.append(len(captured))
    # A returned cache holds its graphs as long as somebody has it, and a model keeps two workspaces.
    assert numbers[0]
    assert numbers[2] - numbers[1] <= (numbers[0] if policy == "block" else 0)
