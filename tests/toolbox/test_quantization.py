"""Weights quantized on loading, by the packages that run on a CPU."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from dllm_hf.gla_dream.attention_gla_dream import DecayProjection

from ..builders import new_model
from .conftest import decoded, logits_of, training_batch

BACK_ENDS = ("torchao", "quanto", "bitsandbytes")
# Sizes that the 4-bit kernel for CPUs can pack: multiples of 32, and 64 weights to a scale.
EVEN = {"llada": {"d_model": 64, "mlp_hidden_size": 64}}
EVEN |= {
    name: {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    for name in ("sdar", "sdar_moe", "llada2", "nemotron_diffusion")
}
EVEN["llada2"] |= {"moe_intermediate_size": 64}


@pytest.fixture(params=BACK_ENDS)
def back_end(request) -> str:
    pytest.importorskip("accelerate")
    pytest.importorskip({"quanto": "optimum.quanto"}.get(request.param, request.param))
    return request.param


def int8(back_end):
    if back_end == "quanto":
        return QuantoConfig(weights="int8")
    if back_end == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def load(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def assert_close(logits, expected):
    """To a few hundredths of their spread. A router may send a token elsewhere, which is why it is not said of each."""
    assert ((logits - expected).abs().median() / expected.std()) < 0.05


def test_int8_weights_give_nearly_the_same_logits_and_decode(back_end, model, folder):
    quantized = load(folder, int8(back_end))
    for name, module in quantized.named_modules():
        # Of a class of its own, GLADream's projection to the decays is a linear layer to some and none to others.
        if isinstance(module, nn.Linear) and not isinstance(module, DecayProjection):
            is_quantized = type(module.weight) is not nn.Parameter
            assert is_quantized == (name != "lm_head"), name
    logits = logits_of(quantized)
    assert not logits.equal(logits_of(model))
    assert_close(logits, logits_of(model))
    decoded(quantized)


@pytest.mark.parametrize("back_end", ["torchao", "bitsandbytes"], indirect=True)
def test_int8_weights_are_saved_and_loaded(back_end, folder, tmp_path):
    quantized = load(folder, int8(back_end))
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(logits_of(again), logits_of(quantized), atol=0, rtol=0)
    assert decoded(again) == decoded(quantized)


@pytest.mark.parametrize("back_end", ["bitsandbytes"], indirect=True)
def test_4_bit_weights_decode(back_end, family, tmp_path):
    model = new_model(family, **EVEN.get(family, {"hidden_size": 64, "intermediate_size": 64}))
    model.save_pretrained(tmp_path)
    # The kernel for CPUs packs 32 outputs; the low-rank projection of GLADream's decays has 16.
    narrow = ["lm_head", "gk_proj.0"] if family == "gla_dream" else None
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=narrow)
    quantized = load(tmp_path, config)
    assert quantized.get_memory_footprint() < 0.8 * model.get_memory_footprint()
    decoded(quantized)


@pytest.mark.parametrize("back_end", ["bitsandbytes"], indirect=True)
def test_adapters_are_trained_on_quantized_weights(back_end, folder):
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(load(folder, int8(back_end)))
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    adapted(**training_batch()).loss.backward()
    reached = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert reached and reached == {name for name, _ in adapted.named_parameters() if "lora_" in name}
