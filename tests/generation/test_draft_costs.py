"""`draft_steps="auto"`: drafts as far as their rows are worth what they cost."""

from types import SimpleNamespace

import pytest
import torch

from dllm_hf.fused.stack import FusedStack
from dllm_hf.generation import draft_costs
from dllm_hf.generation.draft_costs import FEWER_PASSES, MOST_TOKENS, most_worth, pass_times, room_for_drafts

from ..builders import BUILDERS, new_model

ON_A_GPU = {"device": torch.device("cuda")}


class Model(SimpleNamespace):
    __hash__ = object.__hash__


def options(policy: str = "dual", block_length: int | None = 32) -> SimpleNamespace:
    return SimpleNamespace(cache_policy=policy, block_length=block_length)


@pytest.mark.parametrize(
    "times, drafts",
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], 4),  # the weights take all of the time
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0),  # the rows
        ([6.95, 7.4, 7.93, 9.2, 9.29], 2),  # as LLaDA-8B on an H100
        ([1.0, 1.1, 5.0, 5.0, 5.0], 1),
        ([1.0], 0),
    ],
)
def test_the_number_of_drafts_is_the_one_with_which_a_text_takes_least_time(times, drafts):
    assert most_worth(times) == drafts


def test_a_gpu_is_asked_once_for_each_number_of_tokens_of_a_step(monkeypatch):
    asked = []

    def timed(model, fused, sizes):
        asked.append(sizes)
        return [1.0, 1.0, 1.0, 9.0, 9.0][: len(sizes)]

    monkeypatch.setattr(draft_costs, "pass_times", timed)
    model, other = Model(**ON_A_GPU), Model(**ON_A_GPU)
    room = lambda model, *shape, **given: room_for_drafts("auto", model, None, options(**given), shape)
    for _ in range(2):
        assert room(model, 1, 500) == (4, 32 * 3)
    assert room(model, 4, 500) == (4, 128 * 3)
    assert room(model, 1, 20) == (4, 20 * 3)  # a canvas shorter than a block
    assert room(model, 1, 40, block_length=None) == (4, 40 * 3)
    assert room(other, 1, 500) == (4, 32 * 3)
    assert asked == [[n * k for k in range(1, 6)] for n in (32, 128, 20, 40, 32)]


def test_passes_that_compute_longer_than_they_read_have_no_drafts(monkeypatch):
    asked = []
    monkeypatch.setattr(
        draft_costs, "pass_times", lambda model, fused, sizes: asked.append(sizes) or [1.0] * len(sizes)
    )
    room = lambda columns: room_for_drafts("auto", Model(**ON_A_GPU), None, options("none"), (1, columns))
    assert room(MOST_TOKENS // 2) == (4, MOST_TOKENS) and asked == [[MOST_TOKENS // 2, MOST_TOKENS]]
    assert room(MOST_TOKENS // 2 + 1) == (4, MOST_TOKENS // 2 + 1) and len(asked) == 1


def test_a_number_is_taken_as_it_is_and_a_cpu_has_none():
    cpu = Model(device=torch.device("cpu"))
    assert [room_for_drafts(steps, cpu, None, options(), (1, 64)) for steps in (None, 0, 3, "auto")] == [
        (0, None),
        (0, None),
        (3, None),
        (0, None),
    ]
    assert room_for_drafts(3, Model(**ON_A_GPU), None, options(), (1, 64)) == (3, None)


@pytest.mark.parametrize("family", [family for family in BUILDERS if family != "gla_dream"])
@torch.no_grad()
def test_what_is_timed_is_the_network_of_every_layer(family, monkeypatch):
    model = new_model(family).eval()
    stack, fed = FusedStack.of(model), []
    x = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for index, layer in enumerate(model.model.layers):
        out = layer.mlp(x)
        torch.testing.assert_close(stack.network(index, x), out[0] if isinstance(out, tuple) else out)
    network = stack.network
    stack.network = lambda index, x: fed.append((index, x.shape[1])) or network(index, x)
    monkeypatch.setattr(draft_costs, "replaying", lambda run: run)
    monkeypatch.setattr(draft_costs, "milliseconds", lambda run: run() or 1.0)
    state = torch.get_rng_state()
    assert pass_times(model, stack, [4, 8]) == [1.0, 1.0]
    assert fed == [(index, size) for size in (4, 8) for index in range(model.config.num_hidden_layers)]
    assert torch.equal(torch.get_rng_state(), state), "what the caller draws has changed"


@torch.no_grad()
def test_without_kernels_the_model_s_own_pass_is_timed(monkeypatch):
    model, shapes = new_model("llada").eval(), []
    monkeypatch.setattr(draft_costs, "milliseconds", lambda run: shapes.append(run().logits.shape[:2]) or 1.0)
    assert pass_times(model, None, [4, 8]) == [1.0, 1.0]
    assert shapes == [(1, 1), (1, 1)]


def test_each_draft_saves_passes():
    assert list(FEWER_PASSES) == sorted(FEWER_PASSES) and FEWER_PASSES[0] == 1
