"""`draft_steps="auto"`: drafts as far as their rows are worth what they cost."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dllm_hf.fused.stack import FusedStack
from dllm_hf.generation import draft_costs
from dllm_hf.generation.draft_costs import FEWER_PASSES, MOST_TOKENS, most_worth, pass_times, room_for_drafts
from dllm_hf.generation.drafts import FREE_TOKENS

from ..builders import BUILDERS, new_model

CUDA = torch.device("cuda")


class Model(SimpleNamespace):
    """What says where it is, and what its windows feed."""

    def __init__(self, device=CUDA, logits_shift=0, sees_earlier_blocks=False):
        super().__init__(device=device, logits_shift=logits_shift, sees_earlier_blocks=sees_earlier_blocks)


class Kernels:
    network = None


def room(model, fused, *shape, policy: str = "dual", block_length: int | None = 32):
    options = SimpleNamespace(cache_policy=policy, block_length=block_length)
    return room_for_drafts("auto", model, fused, options, shape)


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
    model, kernels, others = Model(), Kernels(), Kernels()
    for _ in range(2):
        assert room(model, kernels, 1, 500) == (4, 32 * 3)
    assert room(model, kernels, 4, 500) == (4, 128 * 3)
    assert room(model, kernels, 1, 20) == (4, 20 * 3)  # a canvas shorter than a block
    assert room(model, kernels, 1, 40, block_length=None) == (4, 40 * 3)
    assert room(model, others, 1, 500) == (4, 32 * 3)
    assert asked == [[n * k for k in range(1, 6)] for n in (32, 128, 20, 40, 32)]


def test_a_step_feeds_the_column_before_its_block_where_that_predicts_the_first_token(monkeypatch):
    monkeypatch.setattr(draft_costs, "pass_times", lambda model, fused, sizes: [1.0] * len(sizes))
    assert room(Model(logits_shift=1), Kernels(), 2, 500) == (4, 2 * 33 * 5)
    assert room(Model(logits_shift=1, sees_earlier_blocks=True), Kernels(), 2, 500) == (4, 2 * 32 * 5)


def test_where_drafts_are_not_worth_their_rows_there_are_none(monkeypatch):
    asked = []
    times = lambda model, fused, sizes: asked.append(sizes) or [float(size) for size in sizes]
    monkeypatch.setattr(draft_costs, "pass_times", times)
    assert room(Model(), Kernels(), 1, 500) == (0, None) and len(asked) == 1
    monkeypatch.setattr(
        draft_costs, "pass_times", lambda model, fused, sizes: asked.append(sizes) or [1.0] * len(sizes)
    )
    half = MOST_TOKENS // 2
    assert room(Model(), Kernels(), 1, half, block_length=None) == (4, MOST_TOKENS) and asked[1] == [half, 2 * half]
    # What is computed longer than it is read need not be asked about.
    assert room(Model(), Kernels(), 1, half + 1, block_length=None) == (0, None) and len(asked) == 2


def test_without_kernels_or_a_cache_drafts_fill_a_pass_up_to_128_tokens():
    assert room(Model(), None, 1, 500) == room(Model(), Kernels(), 1, 500, policy="none") == (4, FREE_TOKENS)
    assert FREE_TOKENS == 128


def test_a_number_is_taken_as_it_is_and_a_cpu_has_none():
    cpu = Model(torch.device("cpu"))
    for steps, expected in ((None, 0), (0, 0), (3, 3), ("auto", 0)):
        assert room_for_drafts(steps, cpu, None, SimpleNamespace(), (1, 64)) == (expected, None)
    assert room_for_drafts(3, Model(), Kernels(), SimpleNamespace(), (1, 64)) == (3, None)


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
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    state = torch.get_rng_state()
    assert pass_times(model, stack, [4, 8]) == [1.0, 1.0]
    assert fed == [(index, size) for size in (4, 8) for index in range(model.config.num_hidden_layers)]
    assert torch.equal(torch.get_rng_state(), state), "what the caller draws has changed"


def test_each_draft_saves_passes():
    assert list(FEWER_PASSES) == sorted(FEWER_PASSES) and FEWER_PASSES[0] == 1
