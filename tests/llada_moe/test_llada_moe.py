"""What LLaDA-MoE has beside a Qwen3-MoE."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dllm_hf import LLaDAConfig, LLaDAMoEConfig, LLaDAMoEModelLM

from ..builders import llada_moe_config

EVERYTHING = {"num_hidden_layers": 3, "moe_layer_freq": [0, 1, 1], "shared_expert_intermediate_size": 16}
EVERYTHING |= {"moe_router_enable_expert_bias": True, "num_experts": 4}


def biased_model(**changes) -> LLaDAMoEModelLM:
    torch.manual_seed(0)
    model = LLaDAMoEModelLM(llada_moe_config(**{**EVERYTHING, **changes})).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.uniform_(-0.3, 0.3)
    return model


def test_a_shared_expert_and_biases_stand_on_disk_where_the_original_has_them(tmp_path):
    model = biased_model()
    model.save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if "layers.1.mlp" in name or "shared" in name}
    parts = ("gate_proj", "up_proj", "down_proj")
    expected = {f"model.layers.1.mlp.experts.{number}.{part}.weight" for number in range(4) for part in parts}
    expected |= {f"model.layers.{layer}.shared_expert.{part}.weight" for layer in (1, 2) for part in parts}
    assert names == expected | {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.expert_bias"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_layer_computes_what_the_original_does():
    """The bias is added before the choice and stays in the weights, which are not divided by their sum; the shared expert
    is added without a gate."""
    model = biased_model(norm_topk_prob=True)
    mlp, x = model.model.layers[1].mlp, torch.randn(5, 32)
    silu = torch.nn.functional.silu
    expected = mlp.shared_expert.down_proj(silu(mlp.shared_expert.gate_proj(x)) * mlp.shared_expert.up_proj(x))
    scores = (x @ mlp.gate.weight.T).softmax(-1) + mlp.gate.expert_bias
    for row, experts in enumerate(scores.topk(2).indices.tolist()):
        for expert in experts:
            gate, up = (mlp.experts.gate_up_proj[expert] @ x[row]).chunk(2)
            expected[row] += scores[row, expert] * (mlp.experts.down_proj[expert] @ (silu(gate) * up))
    torch.testing.assert_close(mlp(x[None])[0], expected, atol=1e-5, rtol=1e-5)


def test_layers_without_experts_are_those_that_the_configuration_says():
    model = biased_model()
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True, True]
    assert model.model.layers[0].mlp.gate_proj.out_features == 48


def test_the_two_families_of_one_model_type_are_told_apart(tmp_path):
    config = llada_moe_config()
    config.save_pretrained(tmp_path)
    for read in (AutoConfig, LLaDAConfig, LLaDAMoEConfig):
        assert type(read.from_pretrained(tmp_path)) is LLaDAMoEConfig
    assert type(LLaDAConfig.from_dict(config.to_dict())) is LLaDAMoEConfig
    assert type(LLaDAConfig.from_dict({"model_type": "llada", "n_layers": 2})) is LLaDAConfig


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"qk_layernorm": False}, "qk_layernorm=False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq.*2 layers"),
        ({"moe_layer_freq": [1, 2]}, "moe_layer_freq"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5.*num_experts=4"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"expert_intermediate_size": 0}, "expert_intermediate_size=0"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        llada_moe_config(**changes)
