"""torchao's weights on a GPU: what the fused stack computes, in graphs, and what it is loaded from."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dllm_hf.fused.quantized_products import KINDS, QuantizedProducts
from dllm_hf.fused.stack import FusedStack
from dllm_hf.generation import graphs
from dllm_hf.quantization import FORMATS, quantization_config

from ..builders import as_list, new_model, window_of

pytestmark = pytest.mark.gpu
pytest.importorskip("torchao")


@pytest.fixture(params=FORMATS)
def weights(request):
    if request.param == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8")
    return request.param


def quantized(model, weights: str):
    from torchao.quantization import quantize_

    quantize_(model, quantization_config(weights).quant_type, lambda module, name: type(module) is nn.Linear)
    return model


def large(family: str):
    sizes = {"head_dim": 64} if family == "sdar" else {}
    model = new_model(family, hidden_size=256, intermediate_size=512, **sizes)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.08)
    return model.cuda().bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_the_fused_stack_is_as_near_to_the_model_before_as_the_plain_path_is(family, weights, rows):
    model = large(family)
    tokens, columns = (torch.arange(rows * 8, device="cuda") % 60).view(rows, 8), torch.arange(8, device="cuda")
    block = {"block_size": 8} if family == "sdar" else {}
    exact = copy.deepcopy(model).double()(tokens, **block).logits
    model = quantized(model, weights)
    plain = model(tokens, **block).logits
    stack, cache = FusedStack.of(model), model.make_cache(20)
    joint = [each for of_layer in stack.inputs for each in of_layer] + stack.gates
    assert all(isinstance(each, QuantizedProducts) and type(each) in KINDS.values() for each in joint)
    stack.prepare(cache, rows)
    fused = stack(tokens.flatten(), as_list(window_of(columns.expand(rows, 8), columns.expand(rows, 8))), cache)
    errors = [float((logits.double() - exact).norm() / exact.norm()) for logits in (fused, plain)]
    assert 0 < errors[0] < 1.15 * errors[1] < 0.7, errors


@pytest.mark.parametrize(("family", "policy"), [("llada", "dual"), ("dream", "dual"), ("sdar", "block")])
def test_steps_run_as_graphs(family, policy, weights, monkeypatch):
    captured, capture = [], graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: captured.append(capture(*args)) or captured[-1])
    model = quantized(large(family), weights)
    prompt = torch.arange(12, device="cuda")[None]
    options = {"remasking_strategy": "low_confidence_static"}  # Dream's own draws the order
    run = lambda: model.diffusion_generate(prompt, max_new_tokens=24, block_length=8, cache_policy=policy, **options)
    first = run()
    assert captured and torch.equal(run(), first) and not (first == model.config.mask_token_id).any()


def test_weights_are_quantised_on_loading(weights, tmp_path):
    pytest.importorskip("accelerate")
    large("llada").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, device_map="cuda", quantization_config=quantization_config(weights)
    )
    assert all(
        type(module.weight) is not nn.Parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (weights != "int4" or name != "lm_head")
    )
    model.save_pretrained(tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", device_map="cuda")
    prompt = torch.arange(12, device="cuda")[None]
    tokens = [each.diffusion_generate(prompt, max_new_tokens=16, cache_policy="dual") for each in (model, again)]
    assert torch.equal(*tokens)
