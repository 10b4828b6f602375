"""The small projections before norms that change nothing, in fewer bits: an SDAR that started from a Llama."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from dllm_hf import LLM, SDARForCausalLM
from dllm_hf.edge import load_hf_model
from dllm_hf.edge.export import _quantized
from dllm_hf.fused.quantized_products import Int8Products
from dllm_hf.fused.stack import FusedStack
from dllm_hf.hub import quantize
from dllm_hf.quantization import check_runs, quantization_config

from ..builders import END, MASK, VOCAB, as_list, window_of

pytest.importorskip("torchao")
pytest.importorskip("accelerate")
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_  # noqa: E402

TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": END, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def sdar(llama, tmp_path_factory):
    """A folder with norms that change nothing."""
    folder = tmp_path_factory.mktemp("sdar")
    SDARForCausalLM.from_ar_pretrained(llama[1], mask_token_id=MASK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(sdar, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    quantize(str(sdar), folder, "int8", "cpu")
    return folder


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((logits.double() - expected.double()).norm() / expected.double().norm())


def in_int8(weight: torch.Tensor, config) -> torch.Tensor:
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    quantize_(linear, config)
    return linear.weight


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16]), st.lists(st.integers(-40, 10), min_size=4, max_size=4))
def test_rows_of_any_magnitude_have_the_eight_bits_of_ordinary_ones(dtype, exponents):
    """To the bit those that torchao gives to weights of 0.05; the scales are times the power of two."""
    weight = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    powers = torch.tensor(exponents).double().exp2().float()[:, None]
    expected = in_int8(weight, Int8WeightOnlyConfig(set_inductor_config=False))
    found = in_int8(weight * powers.to(dtype), quantization_config("int8", "cpu").quant_type)
    assert found.dtype == dtype and found.scale.dtype == torch.float32
    assert torch.equal(found.qdata, expected.qdata) and torch.equal(found.scale, expected.scale * powers)


def test_the_smallest_and_the_largest_numbers_of_float16_and_zeros_are_quantised():
    weight = torch.tensor([[2.0**-24, -(2.0**-24)], [65504.0, -65504.0], [0.0, 0.0]]).half()
    found = in_int8(weight, quantization_config("int8", "cpu").quant_type)
    assert torch.allclose(found.dequantize(torch.float32), weight.float(), rtol=1 / 127, atol=0)  # a step


@torch.no_grad()
def test_it_says_in_int8_what_the_original_says_in_int8(llama, sdar, quantized):
    """Quantised on loading, and with `quantize`: with blocks of one token, as near to the float32 Llama as its own int8."""
    original, folder = llama
    config = quantization_config("int8", "cpu")
    theirs = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=config.modules_to_not_convert)
    expected = loaded(folder, quantization_config=theirs, device_map="cpu")(TOKENS).logits
    for model in (loaded(sdar, quantization_config=config, device_map="cpu"), loaded(quantized)):
        logits = model(TOKENS, block_size=1).logits
        assert distance(logits, expected) < 1e-5
        assert 0 < distance(logits, original(TOKENS).logits) < 0.1  # of zeros: 1.4


def test_what_is_written_is_of_torchao_s_own_configuration(quantized):
    config = AutoModelForCausalLM.from_pretrained(quantized).config.quantization_config
    assert type(config.quant_type) is Int8WeightOnlyConfig


@torch.no_grad()
def test_the_fused_stack_is_as_near_to_float32_as_the_plain_path_is(sdar, quantized):
    tokens, columns = torch.arange(32).view(4, 8), torch.arange(8).expand(4, 8)
    exact, model = loaded(sdar)(tokens, block_size=8).logits, loaded(quantized, dtype=torch.bfloat16)
    errors = [distance(model(tokens, block_size=8).logits, exact)]
    stack, cache = FusedStack.of(model), model.make_cache(20)
    assert all(type(each) is Int8Products for of_layer in stack.inputs for each in of_layer)
    stack.prepare(cache, 4)
    errors.append(distance(stack(tokens.flatten(), as_list(window_of(columns, columns)), cache), exact))
    assert 0 < errors[1] < 1.1 * errors[0] < 0.08


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_a_model_that_was_quantised_to_zeros_is_refused(sdar, config):
    """On loading, by the engine, and where it comes onto the fast path."""
    recipe = config(set_inductor_config=False)
    message = r"`model.layers.0.self_attn.q_proj` was quantised to zeros.*quantization_config"
    with pytest.raises(ValueError, match=message):
        loaded(sdar, quantization_config=TorchAoConfig(recipe), device_map="cpu")
    model = loaded(sdar)
    check_runs(model)
    quantize_(model, recipe)
    for attempt in (check_runs, LLM, SDARForCausalLM.step_forward):
        with pytest.raises(ValueError, match=message):
            attempt(model)


def test_bitsandbytes_is_refused_in_8_bits_and_taken_in_4(sdar):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="q_proj` was quantised to zeros.*bitsandbytes"):
        loaded(sdar, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    loaded(sdar, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu")


def test_float16_is_refused_for_such_a_model(sdar):
    with pytest.raises(ValueError, match="q_proj` is in float16.*bfloat16 or float32"):
        loaded(sdar, dtype=torch.float16)
    trained = loaded(sdar)
    trained.drop_identity_norms()
    check_runs(trained.half())


def test_projections_of_zeros_are_no_reason_to_refuse_it(sdar):
    model = loaded(sdar)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    quantize_(model, quantization_config("int8", "cpu").quant_type)
    check_runs(model)


@torch.no_grad()
def test_other_eight_bits_and_float16_hold_its_projections_in_their_usual_size(sdar):
    """PyTorch's own in `load_hf_model`, and what ExecuTorch gets."""
    expected = loaded(sdar)(TOKENS).logits
    assert 0 < distance(load_hf_model(sdar, dtype=torch.qint8)[0](TOKENS)[0], expected) < 0.2
    weight = _quantized(loaded(sdar), "fp16").model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float16 and 0.1 < weight.std() < 0.3
