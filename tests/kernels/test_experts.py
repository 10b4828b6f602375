"""The kernels of mixtures of experts against their twins, and these against the library's modules."""

import pytest
import torch

pytest.importorskip("triton")

from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

from dllm_hf.fused.experts import on_kernels
from dllm_hf.kernels.experts import choose_experts, choose_experts_torch, routed_experts, routed_experts_torch

from .test_kernels import DEVICE, ON_GPU, close, random

HALF = torch.bfloat16 if ON_GPU else torch.float16  # whose products the interpreter knows
GROUPED = {"groups": 4, "chosen_groups": 2, "scale": 2.5}


def grouped(experts: int) -> dict:
    return {**GROUPED, "bias": random(experts, seed=3)}


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("experts,number,is_grouped", [(8, 2, False), (6, 4, False), (32, 8, True), (16, 3, True)])
def test_a_token_is_given_the_experts_of_the_highest_rank(experts, number, is_grouped, normalises):
    logits = random(5, experts)
    options = grouped(experts) if is_grouped else {}
    weights, chosen = choose_experts(logits, number, normalises, **options)
    expected, index = choose_experts_torch(logits, number, normalises, **options)
    assert torch.equal(chosen, index)
    close(weights, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    "tokens,experts,number,hidden,inside",
    [(1, 4, 2, 32, 24), (7, 8, 8, 48, 16), (40, 3, 2, 40, 72), (70, 2, 1, 32, 32)],
)
def test_each_token_is_multiplied_by_its_experts_alone(tokens, experts, number, hidden, inside, dtype):
    x = random(tokens, hidden, dtype=dtype)
    gate_up, down = (
        random(experts + 1, 2 * inside, hidden, dtype=dtype),
        random(experts + 1, hidden, inside, dtype=dtype),
    )
    gate_up[experts] = down[experts] = float("nan")  # nobody chooses it
    chosen = random(tokens, experts, seed=1).topk(number, dim=-1)[1]
    weights = random(tokens, number, seed=2).softmax(-1)
    got = routed_experts(x, chosen, weights, gate_up, down)
    wide = (each.double() for each in (x, weights, gate_up, down))
    expected = routed_experts_torch(next(wide), chosen, *wide)
    close(got, expected, dtype)


def test_weights_may_be_parts_of_larger_ones():
    gate_up, down = random(3, 64, 80)[..., :32], random(3, 48, 64)[:, :32, :32]
    x, chosen = random(4, 32), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]], device=DEVICE)
    weights = random(4, 2)
    close(
        routed_experts(x, chosen, weights, gate_up, down),
        routed_experts_torch(x, chosen, weights, gate_up, down),
        torch.float32,
    )


@pytest.mark.parametrize("is_fused", [False, True], ids=["twins", "kernels"])
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
def test_a_network_of_experts_is_the_librarys(name, is_fused):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
    if name == "glm4_moe":
        config = Glm4MoeConfig(**sizes, n_routed_experts=16, n_group=4, topk_group=2, n_shared_experts=2)
        mlp = Glm4MoeMoE(config)
        torch.nn.init.normal_(mlp.gate.e_score_correction_bias)
    else:
        mlp = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, num_experts=8))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mlp, x = mlp.to(DEVICE).eval(), random(2, 5, 32)
    with torch.no_grad():
        close(on_kernels(mlp, set(), is_fused)(x), mlp(x), torch.float32)


def test_a_token_in_a_list_gets_what_it_gets_alone():
    x, chosen = random(9, 32), random(9, 4, seed=1).topk(2, dim=-1)[1]
    weights, gate_up, down = random(9, 2), random(4, 48, 32), random(4, 32, 24)
    together = routed_experts(x, chosen, weights, gate_up, down)
    for token in (0, 8):
        one = slice(token, token + 1)
        assert torch.equal(routed_experts(x[one], chosen[one], weights[one], gate_up, down), together[one])
