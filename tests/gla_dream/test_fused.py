"""The step on our kernels (their torch twins without a GPU) is the model's own forward pass."""

import copy
import itertools

import pytest
import torch
from torch import nn

from dllm_hf.gla_dream import fused_gla_dream
from dllm_hf.gla_dream.attention_gla_dream import GLADreamAttention
from dllm_hf.gla_dream.fused_gla_dream import EagerStep, FusedGLADream

from ..builders import new_model, window_of
from .conftest import INJECTIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = {
    "global": {},
    "boundary": {"inter_block_injection_mode": "boundary", "share_inter_intra_gate_weights": True},
    "grouped heads": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "wider values": {"expand_v": 2},
    "fewer decays": {"gate_low_rank_dim": 3, "gate_logit_normalizer": 2},
    "shifted": {"logits_shift": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "blocks of 1": {"block_size": 1},
    "another activation": {"hidden_act": "gelu"},
    "short convolutions": {"conv_size": 3, "num_key_value_heads": 1},
    "wider convolutions": {"conv_size": 9, "expand_v": 2, "attention_bias": True, "block_size": 5},
}


@torch.no_grad()
def check_a_step(model):
    """That it has the logits of the model's own forward pass and leaves the states as they are; behind a finished block,
    that it moves the states of the rows that have one."""
    size = model.config.block_size
    tokens = torch.randint(0, 50, (3, 4 * size), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache = model.make_cache(5 * size)
    model(tokens[:, : 2 * size], past_key_values=cache, use_cache=True)
    states = [layer.state.clone() for layer in cache.layers]
    starts = torch.tensor([[2 * size], [2 * size], [3 * size]], device=DEVICE)
    # The last row has no finished block, and repeats its last column.
    columns = (starts + torch.arange(2 * size, device=DEVICE)).clamp(max=4 * size - 1)

    def both(columns, starts_of_block, settled):
        keep = torch.arange(size, device=DEVICE) + starts_of_block - columns[:, :1] - model.logits_shift
        found = []
        for forward in (EagerStep(model), FusedGLADream.of(model)):
            own = copy.deepcopy(cache)
            logits = forward(tokens.gather(1, columns), window_of(columns, keep, settled), own)
            found.append([logits, own.last_hidden, *(layer.state for layer in own.layers)])
        for got, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-4)
        return found[1][2:]

    for state, before in zip(both(columns[:, :size], starts, starts), states):
        assert torch.equal(state, before)
    for state, before in zip(
        both(columns, torch.full_like(starts, 3 * size), torch.full_like(starts, 3 * size)), states
    ):
        assert torch.equal(state[2], before[2]) and not torch.isclose(state[:2], before[:2]).all(-1).any()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_step_has_the_logits_of_the_model(changes):
    model = new_model("gla_dream", **changes).to(DEVICE).eval()
    for parameter in model.parameters():  # biases are zeros when they are made
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_a_step(model)


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("most", [512, 7, 1])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_prompt_leaves_the_states_of_the_model(changes, most, decodes, monkeypatch):
    """Of rows that begin elsewhere and have different numbers of blocks, one of them none; read at once or in parts."""
    monkeypatch.setattr(fused_gla_dream, "MOST_BLOCKS", most)
    model = new_model("gla_dream", **changes).to(DEVICE).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    size, cache = model.config.block_size, model.make_cache(9 * model.config.block_size)
    tokens = torch.randint(0, 50, (5, 8 * size), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    model(tokens[:, : 2 * size], past_key_values=cache, use_cache=True)  # slot 1 belongs to nobody
    cache.reserve(5)
    slots, starts = torch.tensor([4, 0, 3, 2]), torch.tensor([[0], [2], [2], [1]]) * size
    ends = starts + torch.tensor([[5], [3], [0], [1]]) * size
    # Alone, or before the block being decoded; in a row without a block those logits mean nothing.
    keep = torch.arange(size) + (ends - starts) - model.logits_shift if decodes else torch.empty(4, 0, dtype=torch.long)
    width = (5 + decodes) * size
    columns = torch.minimum(starts + torch.arange(width), torch.maximum(ends + decodes * size - 1, starts))
    window = window_of(columns, keep, ends, slots.tolist())
    found = []
    for forward in (EagerStep(model), FusedGLADream.of(model)):
        own = copy.deepcopy(cache)
        logits = forward(tokens.cpu()[slots].gather(1, columns).to(DEVICE), window.to(torch.device(DEVICE)), own)
        found.append([logits, own.last_hidden, *(layer.state for layer in own.layers)])
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-5, rtol=2e-4)
    states = [cache.last_hidden, *(each.state for each in cache.layers)]
    for got, expected, before in zip(found[1][1:], found[0][1:], states, strict=True):
        if got is not None:
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-4)
            assert torch.equal(got[[1, 3]], before[[1, 3]]) and not torch.equal(got[4], before[4])


@pytest.mark.parametrize("name", ["q_proj", "g_proj", "intra_gate_proj", "o_proj"])
def test_a_projection_that_was_replaced_is_called(name):
    model = new_model("gla_dream").to(DEVICE)
    attention = model.model.layers[1].self_attn
    setattr(attention, name, nn.Sequential(getattr(attention, name), nn.Tanh()))
    check_a_step(model)


@torch.no_grad()
def test_in_bfloat16_the_logits_are_as_near_to_float64_as_the_model_s_own():
    errors = {"kernel": 0.0, "own": 0.0}
    for injection, conv, seed in itertools.product(INJECTIONS, (0, 5), range(3)):
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "block_size": 32}
        model = new_model("gla_dream", inter_block_injection_mode=injection, conv_size=conv, **sizes)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08)
        model = model.to(DEVICE).bfloat16()
        tokens, columns = torch.randint(60, (4, 32), device=DEVICE), torch.arange(32, 64, device=DEVICE).expand(4, 32)
        states = torch.randn(6, 4, 4, 32, 32, device=DEVICE)

        def logits(forward):
            cache = model.make_cache(64)  # noqa: B023
            for layer, state in zip(cache.layers, states):  # noqa: B023
                layer.lazy_initialization(state.clone(), torch.float32)
            return forward(tokens, window_of(columns, columns - 32), cache).double()  # noqa: B023

        precise = copy.deepcopy(model).double()
        exact = logits(EagerStep(precise))
        for name, forward in (("kernel", FusedGLADream.of(model)), ("own", EagerStep(model))):
            errors[name] += float((logits(forward) - exact).norm() / exact.norm())
    assert 0 < errors["kernel"] <= 1.05 * errors["own"], errors


@pytest.mark.parametrize("weights", ["fp8", "int8"])
@torch.no_grad()
def test_quantised_weights_run_on_the_kernels(weights):
    """All but the projections to the decays, which the kernels read themselves."""
    pytest.importorskip("torchao")
    from ..generation.test_quantized import KINDS, quantize

    model = new_model("gla_dream", hidden_size=128, intermediate_size=192, block_size=32, gate_low_rank_dim=16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.08)
    model = model.to(DEVICE).bfloat16()
    precise = copy.deepcopy(model).double()
    quantize(model, weights)
    fused = FusedGLADream.of(model)
    assert {type(each) for products in fused.inputs for each in products} == {KINDS[weights]}
    tokens, columns = torch.randint(60, (2, 64), device=DEVICE), torch.arange(64, device=DEVICE).expand(2, 64)
    starts, errors = torch.full((2, 1), 32, device=DEVICE), []
    step = lambda forward, cache: forward(tokens, window_of(columns, columns[:, 32:], starts), cache)
    cache = precise.make_cache(96)
    exact = step(EagerStep(precise), cache)
    for forward in (fused, EagerStep(model)):
        cache = model.make_cache(96)
        forward.prepare(cache, 2)
        errors.append(float((step(forward, cache).double() - exact).norm() / exact.norm()))
    assert 0 < errors[0] < 1.15 * errors[1] < 0.5, errors


REFUSED = [{"attn_mode": "torch"}, {"block_size": 65}, {"gate_low_rank_dim": 65}, {"hidden_size": 576}]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_what_the_kernel_has_no_room_for_runs_as_it_is(changes):
    assert isinstance(new_model("gla_dream", **changes).step_forward(), EagerStep)


def test_other_types_run_as_they_are():
    assert isinstance(new_model("gla_dream").half().step_forward(), FusedGLADream)
    assert isinstance(new_model("gla_dream").double().step_forward(), EagerStep)


class Quantised(nn.Parameter):
    """A weight that says it is of the model's type, and has no memory that a kernel could read."""


class OtherAttention(GLADreamAttention):
    pass


class OtherNorm(nn.RMSNorm):
    pass


def another_forward(layer):
    layer.mlp.forward = layer.mlp.forward


def another_injection(layer):
    layer.self_attn._injected = lambda *arguments: (0.0, 0.0)


def another_attention(layer):
    layer.self_attn.__class__ = OtherAttention


def another_norm(layer):
    layer.input_layernorm.__class__ = OtherNorm


def another_decay(layer):
    layer.self_attn.gk_proj[1].__class__ = nn.Linear


def a_quantised_decay(layer):
    decay = layer.self_attn.gk_proj[1]
    decay.weight = Quantised(decay.weight.data)


def a_patched_decay(layer):
    layer.self_attn.gk_proj[1].forward = layer.self_attn.gk_proj[1].forward


def another_convolution(layer):
    layer.self_attn.k_conv1d.__class__ = nn.Conv1d


def a_quantised_convolution(layer):
    layer.self_attn.k_conv1d.weight = Quantised(layer.self_attn.k_conv1d.weight.data)


def a_wider_convolution(layer):
    layer.self_attn.k_conv1d.weight = nn.Parameter(torch.zeros(16, 1, 5))


def a_transposed_convolution(layer):
    layer.self_attn.k_conv1d.weight = nn.Parameter(torch.zeros(3, 1, 16).permute(2, 1, 0))


CHANGES = [another_forward, another_injection, another_attention, another_norm, another_decay]
CHANGES += [a_quantised_decay, a_patched_decay, another_convolution, a_quantised_convolution]
CHANGES += [a_wider_convolution, a_transposed_convolution]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_layer_that_was_changed_runs_as_it_is(change):
    model = new_model("gla_dream", conv_size=3)
    assert isinstance(model.step_forward(), FusedGLADream)
    change(model.model.layers[1])
    assert isinstance(model.step_forward(), EagerStep)


def test_another_last_norm_runs_as_it_is():
    model = new_model("gla_dream")
    model.model.norm = nn.LayerNorm(32)
    assert isinstance(model.step_forward(), EagerStep)
