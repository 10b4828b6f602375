"""Products of one input as one: the modules keep what they held, in other places."""

import copy
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from dllm_hf.fused.joint_products import JointProducts
from dllm_hf.fused.stack import FusedStack

from ..builders import as_list, new_model, window_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention_of(model):
    return model.model.layers[0].self_attn


def is_joint(model) -> bool:
    attention = attention_of(model)
    query, key = attention.q_proj.weight, attention.k_proj.weight
    return query.data_ptr() + query.nbytes == key.data_ptr()


@pytest.fixture(params=["llada", "dream", "sdar", "sdar_moe", "nemotron_diffusion", "fast_dllm_v2"])
def model(request):
    return new_model(request.param).to(DEVICE)


def test_the_weights_are_what_they_were(model):
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    FusedStack.of(model)
    assert is_joint(model)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_products_are_those_of_the_modules(model):
    attention = attention_of(model)
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(2, 3, linears[0].weight.shape[1], device=DEVICE)
    expected = [linear(x) for linear in linears]
    torch.testing.assert_close(list(JointProducts(linears)(x)), expected)


def test_nothing_moves_the_second_time(model):
    FusedStack.of(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    FusedStack.of(model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


def test_such_a_model_is_saved_and_loaded(model, tmp_path):
    FusedStack.of(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(p.nbytes for p in model.parameters()) + 10_000


def test_such_a_model_is_trained(model):
    FusedStack.of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tokens = torch.arange(8, device=DEVICE)[None]
    before = attention_of(model).q_proj.weight.detach().clone()
    model(input_ids=tokens).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(attention_of(model).q_proj.weight, before)
    x = torch.randn(1, 1, before.shape[1], device=DEVICE)
    joint = FusedStack.of(model).inputs[0][0](x)[0]
    torch.testing.assert_close(joint, attention_of(model).q_proj(x))


def test_the_weights_of_a_model_in_training_stay_where_they_are(model):
    model(input_ids=torch.arange(8, device=DEVICE)[None]).logits.mean().backward()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    FusedStack.of(model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Quantised(nn.Parameter):
    pass


def patched(linear):
    linear.forward = lambda x: torch.full((*x.shape[:-1], 2), 7.0)
    return linear


def without_bias(linear):
    linear.bias = None
    return linear


def quantised(linear):
    linear.weight = Quantised(linear.weight.data)
    return linear


def tied(linear):
    linear.weight = first.weight
    return linear


first = nn.Linear(4, 2)


@pytest.mark.parametrize("change", [patched, without_bias, quantised, tied, lambda linear: nn.Identity()])
@pytest.mark.parametrize("is_first", [True, False])
def test_modules_of_another_kind_run_as_they_are(change, is_first):
    linears = [copy.deepcopy(first), change(nn.Linear(4, 2))][:: -1 if is_first else 1]
    x = torch.randn(2, 1, 4)
    torch.testing.assert_close(list(JointProducts(linears)(x)), [linear(x) for linear in linears])
    linears[-1] = Doubled(4, 2)
    torch.testing.assert_close(list(JointProducts(linears)(x)), [linear(x) for linear in linears])


def test_every_weight_keeps_a_storage_of_its_own(model, tmp_path):
    """Who saves weights takes one storage for one tensor: accelerate would leave out all but the first."""
    FusedStack.of(model)
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert [storage.nbytes() for storage in storages] == [parameter.nbytes for parameter in model.parameters()]
    save_model(model, tmp_path / "model.safetensors")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_model(other, tmp_path / "model.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_memory_goes_with_the_weights():
    linears = [nn.Linear(8, 8, device=DEVICE), nn.Linear(8, 4, device=DEVICE)]
    joint = JointProducts(linears)
    memory = StorageWeakRef(joint.joint[0].untyped_storage())
    del joint
    assert not memory.expired()
    for linear in linears:
        linear.half()
    gc.collect()
    assert memory.expired()


def test_threads_that_begin_together_read_what_the_modules_hold():
    for _ in range(20):
        linears = [nn.Linear(64, 64), nn.Linear(64, 32)]
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(JointProducts, [linears] * 4))
        with torch.no_grad():
            linears[1].weight.zero_()
        assert all((joint.joint[0][64:] == 0).all() for joint in made)


def test_a_copy_and_a_model_that_moved_are_joined_anew(model):
    FusedStack.of(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        attention_of(copied).q_proj.weight.zero_()
    assert attention_of(model).q_proj.weight.abs().sum() > 0
    model.double()
    FusedStack.of(model)
    assert is_joint(model)


@torch.no_grad()
def test_in_bfloat16_the_logits_are_as_near_to_float64_as_the_plain_path_s():
    errors = {"fused": 0.0, "plain": 0.0}
    for family, seed in itertools.product(("llada", "dream", "sdar"), range(3)):
        model = new_model(family, hidden_size=256, intermediate_size=704, num_hidden_layers=6)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08)
        model = model.to(DEVICE).bfloat16()
        tokens = torch.randint(60, (4, 8), device=DEVICE)
        columns = torch.arange(8, device=DEVICE).expand(4, 8)
        block = {"block_size": 8} if family == "sdar" else {}
        exact = copy.deepcopy(model).double()(tokens, **block).logits
        stack, cache = FusedStack.of(model), model.make_cache(20)
        stack.prepare(cache, len(tokens))
        found = {"fused": stack(tokens.flatten(), as_list(window_of(columns, columns)), cache)}
        found["plain"] = model(tokens, **block).logits
        for path, logits in found.items():
            errors[path] += float((logits.double() - exact).norm() / exact.norm())
    assert 0 < errors["fused"] < 1.05 * errors["plain"]


def test_weights_that_others_hold_stay_where_they_are(model):
    taken = model.state_dict()
    FusedStack.of(model)
    assert all(tensor.data_ptr() == taken[name].data_ptr() for name, tensor in model.state_dict().items())
    attention = [layer.self_attn for layer in model.model.layers]
    del taken
    attention[1].v_proj.weight = attention[0].v_proj.weight
    places = [parameter.data_ptr() for parameter in attention[0].parameters()]
    FusedStack.of(model)
    assert places == [parameter.data_ptr() for parameter in attention[0].parameters()]


def test_a_weight_made_in_inference_mode_stays_where_it_is(model):
    key = attention_of(model).k_proj
    with torch.inference_mode():
        key.weight = nn.Parameter(key.weight + 0.01)
    stack = FusedStack.of(model)
    x = torch.randn(1, 1, key.in_features, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(stack.inputs[0][0](x)[1], key(x))


def test_a_weight_of_another_size_than_its_module_says_is_taken_as_it_is():
    linears = [nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]
    linears[1].weight = nn.Parameter(torch.randn(2, 4))
    x = torch.randn(1, 1, 4)
    torch.testing.assert_close(list(JointProducts(linears)(x)), [linear(x) for linear in linears])


@pytest.mark.parametrize("name", ["layers.1", "layers.1.self_attn", "layers.1.mlp", "layers.1.input_layernorm", "norm"])
def test_a_module_whose_forward_pass_was_replaced_is_not_passed_over(model, name):
    module = model.model.get_submodule(name)
    assert FusedStack.of(model) is not None
    module.forward = module.forward
    assert FusedStack.of(model) is None
