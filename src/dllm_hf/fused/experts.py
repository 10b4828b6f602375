"""A mixture of experts on our kernels: a copy of its module, with the same weights, in which the parts are ours."""

from collections.abc import Collection
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts, Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from ..generation.ranks import local
from ..kernels.experts import choose_experts, choose_experts_torch, routed_experts, routed_experts_torch
from ..kernels.layers import swiglu, swiglu_torch
from .joint_products import JointProducts

EXPERTS, ROUTERS = (Glm4MoeExperts, Qwen3MoeExperts), (Glm4MoeTopkRouter, Qwen3MoeTopKRouter)


def on_kernels(mlp: nn.Module, divided: Collection[nn.Module], is_fused: bool) -> nn.Module | None:
    """A copy of a feed-forward network of experts that runs on our kernels, or, on a CPU, on their twins.

    Args:
        divided: the modules that are divided between processes; where the experts are, the copy does not sum over them.

    Returns:
        None where the kernels do not cover the network.
    """
    parts: dict[str, Any] = dict(mlp._modules)
    experts: Any = parts.get("experts")
    if type(experts) not in EXPERTS or not isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)):
        return None
    if experts in divided and (parts.keys() != {"gate", "experts"} or getattr(experts, "_is_expert_parallel", False)):
        return None
    parts["experts"] = RoutedExperts(experts, is_fused)
    if type(parts["gate"]) in ROUTERS:
        parts["gate"] = Router(parts["gate"], is_fused)
    for name in parts.keys() & {"shared_experts", "shared_expert"}:
        parts[name] = GatedNetwork(parts[name], is_fused)
    mlp = copy(mlp)
    vars(mlp)["_modules"] = parts
    return mlp


class RoutedExperts(nn.Module):
    def __init__(self, experts: Any, is_fused: bool):
        super().__init__()
        self.experts = experts
        self.compute = routed_experts if is_fused else routed_experts_torch

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate_up, down = local(self.experts.gate_up_proj), local(self.experts.down_proj)
        return self.compute(hidden_states, chosen, weights, gate_up, down)


class Router(nn.Module):
    def __init__(self, router: Any, is_fused: bool):
        super().__init__()
        self.router, self.is_fused = router, is_fused
        self.choose = choose_experts if is_fused else choose_experts_torch
        self.options: tuple = ()
        if isinstance(router, Glm4MoeTopkRouter):
            self.options = (router.num_group, router.topk_group, router.routed_scaling_factor)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the library's routers give: logits, `(tokens, experts)`; weights and indices, `(tokens, number)`."""
        router = self.router
        x, weight = hidden_states.flatten(0, -2), local(router.weight)
        if not self.options:
            logits = nn.functional.linear(x, weight)
            weights, chosen = self.choose(logits, router.top_k, router.norm_topk_prob)
            return logits, weights.to(logits.dtype), chosen
        if self.is_fused and x.dtype == weight.dtype != torch.float32:
            # The products of the library's, which converts both to float32, are the same.
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = nn.functional.linear(x.float(), weight.float())
        bias = router.e_score_correction_bias
        return logits, *self.choose(logits, router.top_k, router.norm_topk_prob, bias, *self.options)


class GatedNetwork(nn.Module):
    """SwiGLU, with one product for gate and up."""

    def __init__(self, mlp: Any, is_fused: bool):
        super().__init__()
        self.inputs, self.down = JointProducts([mlp.gate_proj, mlp.up_proj]), mlp.down_proj
        self.gate = swiglu if is_fused else swiglu_torch

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.inputs(hidden_states)
        return self.down(self.gate(gate, up))
