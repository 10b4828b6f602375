"""What LLaDA2 has beside a GLM-4-MoE."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention

from dllm_hf import LLaDA2MoeConfig

from ..builders import llada2_config, new_model


@torch.no_grad()
def test_attention_is_that_of_glm_with_its_three_projections_in_one():
    model = new_model("llada2")
    ours, theirs = model.model.layers[0].self_attn, Glm4MoeAttention(model.config, 0)
    weights = {**ours.state_dict()}
    parts = weights.pop("query_key_value.weight").split([48, 24, 24])
    theirs.load_state_dict(weights | {f"{name}_proj.weight": part for name, part in zip("qkv", parts)})
    theirs.is_causal = False
    x, angles = torch.randn(2, 5, 32), model.model.rotary_emb(torch.randn(1), torch.arange(5)[None])
    assert angles[0].shape[-1] == 6  # half of a head of 12
    torch.testing.assert_close(ours(x, angles, None)[0], theirs(x, angles, None)[0])


@torch.no_grad()
def test_a_router_divides_by_the_sum_whatever_the_configuration_says():
    router = new_model("llada2", norm_topk_prob=False).model.layers[1].mlp.gate
    _, weights, _ = router(torch.randn(4, 32))
    torch.testing.assert_close(weights.sum(-1), torch.full((4,), 2.5))


def test_a_layer_that_glm_leaves_out_is_loaded(tmp_path):
    model = new_model("llada2", num_hidden_layers=47, hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    model.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def test_the_window_that_the_original_ignores_is_dropped():
    config = llada2_config(sliding_window=4096, max_window_layers=2)
    assert getattr(config, "sliding_window", None) is None
    assert "sliding_window" not in config.to_dict()


def test_the_rotated_part_has_two_names_on_disk_and_one_is_enough(tmp_path):
    for given in (
        {"rotary_dim": 4},
        {"partial_rotary_factor": 1 / 3},
        {"rotary_dim": 4, "partial_rotary_factor": 1 / 3},
    ):
        config = llada2_config(**given)
        config.save_pretrained(tmp_path)
        for each in (config, AutoConfig.from_pretrained(tmp_path)):
            assert each.rope_parameters["partial_rotary_factor"] == pytest.approx(1 / 3)
            assert each.to_dict()["rotary_dim"] == 4
    assert llada2_config().to_dict()["partial_rotary_factor"] == 0.5
    assert LLaDA2MoeConfig().to_dict()["rotary_dim"] == 64


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expert_capacity": 48}, "LLaDA2.2.*Load LLaDA2.0 or 2.1"),
        ({"use_qkv_bias": True}, "use_qkv_bias=True"),
        ({"use_bias": True}, "use_bias=True"),
        ({"score_function": "softmax"}, "score_function"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"num_shared_experts": 0}, "num_shared_experts=0"),
        ({"n_group": 3}, "n_group=3"),
        ({"n_group": 8}, "n_group=8"),
        ({"topk_group": 5}, "topk_group=5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5.*from 1 to 4"),
        ({"rotary_dim": 8, "partial_rotary_factor": 0.5}, "rotary_dim=8"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor=0"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        llada2_config(**changes)
