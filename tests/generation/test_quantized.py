"""torchao's weights in 8 bits on the fast path."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from dllm_hf.fused.joint_products import JointProducts
from dllm_hf.fused.quantized_products import Float8Products, Int8Products, QuantizedProducts
from dllm_hf.fused.stack import FusedStack
from dllm_hf.generation.pool import fingerprint_of

from ..builders import as_list, new_model, window_of
from .recorded_graphs import DEVICE, both_ways, fresh_model

pytest.importorskip("torchao")
pytest.importorskip("accelerate")
from torchao.float8.inference import Float8MMConfig  # noqa: E402
from torchao.quantization import (  # noqa: E402
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4TilePackedTo4dTensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    quantize_,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs  # noqa: E402

FORMATS = ("fp8", "int8")
KINDS = {"fp8": Float8Products, "int8": Int8Products}
FAMILIES = ("llada", "dream", "sdar", "nemotron_diffusion", "fast_dllm_v2")


def quantize(module: nn.Module, weights: str) -> nn.Module:
    """The linear layers as torchao quantises them; in fp8 it would ask for a GPU, though CPUs can multiply."""
    if weights == "int8":
        quantize_(module, Int8WeightOnlyConfig(), lambda each, name: type(each) is nn.Linear)
    for linear in module.modules() if weights == "fp8" else ():
        if type(linear) is nn.Linear:
            how = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
            weight = Float8Tensor.from_hp(
                linear.weight.data, mm_config=Float8MMConfig(use_fast_accum=True), act_quant_kwargs=how
            )
            linear.weight = nn.Parameter(weight, requires_grad=False)
    return module


def linears_of(weights: str, bias: bool = True, size: int = 64, outputs=(48, 32, 32)) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        quantize(nn.Sequential(nn.Linear(size, each, bias)), weights)[0].to(DEVICE, torch.bfloat16) for each in outputs
    ]


def attention_of(model):
    return model.model.layers[0].self_attn


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", FORMATS)
def test_the_products_are_torchao_s(weights, bias, rows):
    linears, x = linears_of(weights, bias), torch.randn(1, rows, 64).to(DEVICE, torch.bfloat16)
    expected = [linear(x) for linear in linears]
    for group in (linears, linears[:1]):
        product = QuantizedProducts.of(group)
        assert type(product) is KINDS[weights]
        for got, wanted in zip(product(x), expected):
            # torchao rounds the scale of int8, and what it is multiplied with.
            assert (got - wanted).float().norm() < 8e-3 * wanted.float().norm()
    assert all(torch.equal(linear(x), wanted) for linear, wanted in zip(linears, expected))


@pytest.mark.parametrize("weights", FORMATS)
def test_the_weights_become_parts_of_joint_ones(weights):
    linears = linears_of(weights)
    before = [(each.weight.qdata.clone(), each.weight.scale.clone()) for each in linears]
    weight, scales = QuantizedProducts.of(linears).tensors
    assert [each.weight.qdata.data_ptr() for each in linears] == [
        part.data_ptr() for part in weight.split([48, 32, 32])
    ]
    for linear, (qdata, scale) in zip(linears, before):
        assert torch.equal(linear.weight.qdata.float(), qdata.float()) and torch.equal(linear.weight.scale, scale)
        assert linear.weight.qdata.untyped_storage().nbytes() == linear.weight.qdata.nbytes
    again = QuantizedProducts.of(linears).tensors
    assert [each.data_ptr() for each in again] == [
        weight.data_ptr(),
        scales.data_ptr(),
    ]  # nothing moves the second time


def packed(outputs: int) -> nn.Linear:
    """A layer of 256 inputs with weights in PyTorch's tiles, which only a GPU can fill and multiply with."""
    linear = nn.Linear(256, outputs, bias=False)
    tiles = torch.randint(0, 100, (outputs // 8, 8, 32, 4), dtype=torch.int32)  # 256 columns take as many as 1,024
    weight = Int4TilePackedTo4dTensor(tiles, torch.randn(8, outputs, 2).bfloat16(), [1, 128], linear.weight.shape)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_int4_weights_are_joined_with_their_scales():
    """That the products are right: tests/gpu/test_quantized.py."""
    linears = list(map(packed, (64, 32)))
    before = [linear.weight.qdata.clone() for linear in linears]
    joint = QuantizedProducts.of(linears).weight
    assert joint.shape == (96, 256) and joint.block_size == [1, 128]
    assert torch.equal(joint.qdata, torch.cat(before))
    assert torch.equal(joint.scale_and_zero[:, 64:], linears[1].weight.scale_and_zero)
    assert joint.qdata[8:].data_ptr() == linears[1].weight.qdata.data_ptr()
    assert QuantizedProducts.of(linears[:1]) is None  # nothing to join


def other_recipes() -> dict:
    recipes = {"groups": Int8WeightOnlyConfig(granularity=PerGroup(32)), "float8": Float8WeightOnlyConfig()}
    return recipes | {"int8 inputs": Int8DynamicActivationInt8WeightConfig()}


@pytest.mark.parametrize("recipe", ["groups", "float8", "int8 inputs", "plain"])
def test_weights_of_other_recipes_run_as_they_are(recipe):
    linears = linears_of("int8")
    other = nn.Sequential(nn.Linear(64, 32)).to(DEVICE, torch.bfloat16)
    if recipe != "plain":
        quantize_(other, other_recipes()[recipe])
    mixed, x = [*linears, other[0]], torch.randn(1, 3, 64).to(DEVICE, torch.bfloat16)
    for group in (mixed, mixed[-1:]):
        assert QuantizedProducts.of(group) is None
        assert all(torch.equal(got, linear(x)) for got, linear in zip(JointProducts(group)(x), group))


@pytest.mark.parametrize("weights", FORMATS)
def test_weights_that_others_hold_stay_where_they_are(weights):
    linears = linears_of(weights)
    held = linears[1].weight.qdata.detach()
    place = held.data_ptr()
    assert QuantizedProducts.of(linears) is None
    assert linears[1].weight.qdata.data_ptr() == place


@torch.no_grad()
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_stack_is_as_near_to_the_model_before_as_the_plain_path_is(family, weights):
    # Sizes that torchao takes: rows and columns of products are multiples of 16.
    sizes = {"head_dim": 32} if family in ("sdar", "nemotron_diffusion") else {}
    errors = {"fused": 0.0, "plain": 0.0}
    for seed in range(2):
        torch.manual_seed(seed)
        model = new_model(family, hidden_size=128, intermediate_size=192, **sizes)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08)
        model = model.to(DEVICE).bfloat16()
        tokens, columns = torch.randint(60, (4, 8), device=DEVICE), torch.arange(8, device=DEVICE).expand(4, 8)
        block = {"block_size": 8} if family == "sdar" else {}
        exact = copy.deepcopy(model).double()(tokens, **block).logits
        model = quantize(model, weights)
        found = {"plain": model(tokens, **block).logits}
        stack, cache = FusedStack.of(model), model.make_cache(20)
        assert [type(each) for of_layer in stack.inputs for each in of_layer] == [KINDS[weights]] * 2
        assert all(type(each) is KINDS[weights] for each in (*stack.gates, *stack.quantized.values()))
        assert len(stack.quantized) == 5  # of two layers, and the head
        stack.prepare(cache, len(tokens))
        found["fused"] = stack(tokens.flatten(), as_list(window_of(columns, columns)), cache)
        for path, logits in found.items():
            errors[path] += float((logits.double() - exact).norm() / exact.norm())
    assert 0 < errors["fused"] < 1.1 * errors["plain"] < 0.5


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize(("family", "policy"), [("llada", "dual"), ("dream", "prefix"), ("sdar", "block")])
def test_int8_weights_give_the_tokens_of_the_plain_path(family, policy):
    model = quantize(fresh_model(family), "int8")  # in float32, where rounding decides nothing
    both_ways(model, max_new_tokens=8, block_length=4, cache_policy=policy)


def test_a_model_whose_quantised_weights_moved_is_known_as_another():
    model = quantize(new_model("llada"), "int8")
    before = fingerprint_of(model)
    assert fingerprint_of(model) == before
    weight = attention_of(model).o_proj.weight
    weight.qdata = weight.qdata.clone()
    assert fingerprint_of(model) != before


def test_a_joined_model_is_saved_and_loaded(tmp_path):
    new_model("llada").save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
    )
    FusedStack.of(loaded)
    loaded.save_pretrained(tmp_path / "joined")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "joined")
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens).logits, loaded(tokens).logits)


@pytest.mark.skipif(DEVICE == "cpu", reason="about a GPU")
def test_a_gpu_without_float8_is_refused(monkeypatch):
    linears = linears_of("fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="cannot multiply"):
        QuantizedProducts.of(linears)
