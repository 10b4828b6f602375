"""A decoder of the library's run on our kernels, for the forward passes of decoding on a GPU."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from ..kernels.attention import canvas_attention, canvas_attention_torch
from ..kernels.layers import (
    add_rms_norm,
    add_rms_norm_torch,
    rotate_and_store,
    rotate_and_store_torch,
    swiglu,
    swiglu_torch,
)
from .cache import CanvasCache
from .graphs import can_be_captured

LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Qwen3MoeDecoderLayer)


class JointProducts:
    """Products of the same input, as one: three small ones leave a third of the memory's speed unused.

    Their weights are put side by side in one tensor, and those of the modules become views of it: nothing is stored
    twice, and whoever trains, saves or moves the modules sees what they always held. Where that cannot be (quantised
    weights, no room for the second copy that exists for a moment, weights in training, views of something else) the
    modules run one by one.
    """

    def __init__(self, linears: list[nn.Linear]):
        self.linears, self.sizes = linears, [linear.weight.shape[0] for linear in linears]
        parameters = [[linear.weight for linear in linears]]
        if linears[0].bias is not None:
            parameters.append([linear.bias for linear in linears])
        self.joint = [_side_by_side(each) for each in parameters]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if any(each is None for each in self.joint):
            return tuple(linear(x) for linear in self.linears)
        return nn.functional.linear(x, *self.joint).split(self.sizes, dim=-1)


def _side_by_side(parameters: list[nn.Parameter | None]) -> torch.Tensor | None:
    """The parameters as one tensor, of which they are views; they are made so if they can be."""
    first = parameters[0]
    plain = all(
        type(each) is nn.Parameter and each.is_contiguous() and each.dtype == first.dtype for each in parameters
    )
    if not plain or not first.is_floating_point() or first.is_inference():
        return None
    rows = sum(each.shape[0] for each in parameters)
    end, together = first.data_ptr(), True
    for each in parameters:
        together &= each.data_ptr() == end
        end += each.nbytes
    storage = first.untyped_storage()
    together &= end <= storage.data_ptr() + storage.nbytes()
    if not together:
        if any(each.grad is not None or each.untyped_storage().nbytes() != each.nbytes for each in parameters):
            return None
        needed = sum(each.nbytes for each in parameters)
        if first.is_cuda and torch.cuda.mem_get_info(first.device)[0] < 2 * needed:
            return None
        with torch.inference_mode(False), torch.no_grad():
            joint = torch.cat([each.data for each in parameters])
        for each, part in zip(parameters, joint.split([each.shape[0] for each in parameters]), strict=True):
            each.data = part
        if first.is_cuda:
            torch.cuda.empty_cache()  # else the holes that they leave, which fit nothing, add up to half of the model
    return first.data.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


class FusedStack:
    """Embeddings, layers, last norm and head of a model.

    Holds the parts of the model and not the model, so that something kept for a model may hold it.
    """

    moves_on = True  # keys are written wherever the window stands

    def __init__(self, stack: PreTrainedModel, head: nn.Module):
        self.embed, self.layers, self.norm, self.rotary = stack.embed_tokens, stack.layers, stack.norm, stack.rotary_emb
        self.head, self.config = head, stack.config
        self.inputs = [JointProducts([getattr(layer.self_attn, f"{n}_proj") for n in "qkv"]) for layer in self.layers]
        self.gates = [
            JointProducts([layer.mlp.gate_proj, layer.mlp.up_proj]) if self._is_gated(layer.mlp) else None
            for layer in self.layers
        ]
        # The twins serve a machine without a GPU: the tests.
        fused = next(head.parameters()).is_cuda
        self.add_norm = add_rms_norm if fused else add_rms_norm_torch
        self.rotate = rotate_and_store if fused else rotate_and_store_torch
        self.attend = canvas_attention if fused else canvas_attention_torch
        self.gate = swiglu if fused else swiglu_torch

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FusedStack | None":
        """None where the model has something that the kernels do not know: adapters, hooks, other attention than
        theirs or SDPA (which nobody asked for in particular), parts on several devices."""
        stack, config = model.model, model.config
        if config._attn_implementation not in ("sdpa", "canvas") or not can_be_captured(model):
            return None
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "default") in ("dynamic", "longrope") or rope.get("partial_rotary_factor", 1) != 1:
            return None  # they look at the positions, on the host, or rotate a part
        for layer in stack.layers:
            attention = layer.self_attn
            projections = (getattr(attention, f"{name}_proj") for name in "qkvo")
            if not isinstance(layer, LAYERS) or getattr(attention, "sliding_window", None) is not None:
                return None
            if not all(isinstance(projection, nn.Linear) for projection in projections):
                return None
        return cls(stack, model.lm_head)

    def prepare(self, cache: CanvasCache, batch: int) -> None:
        """Allocate the cache of `batch` rows: what is captured or compiled must find it."""
        for layer, slot in zip(self.layers, cache.layers, strict=True):
            if not slot.is_initialized:
                size = layer.self_attn.head_dim
                nothing = self.embed.weight.new_empty(batch, layer.self_attn.k_proj.out_features // size, 0, size)
                slot.lazy_initialization(nothing, nothing)

    def __call__(
        self,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        lengths: torch.Tensor,
        keep: torch.Tensor,
        cache: CanvasCache,
    ) -> torch.Tensor:
        """Args:
            tokens, columns: `(batch, window)`. Keys and values of the window go into these columns of the cache.
            lengths: `(batch, window)` int32, the columns that each token sees.
            keep: `(batch, kept)`, indices into the window.

        Returns:
            Logits, `(batch, kept, vocab)`.
        """
        batch, window = tokens.shape
        total = self.embed(tokens)
        cos, sin = (x.expand(batch, -1, -1).contiguous() for x in self.rotary(total, columns))
        first = self.layers[0].input_layernorm
        normed, total = self.add_norm(total, None, first.weight, first.variance_epsilon)
        for index, layer in enumerate(self.layers):
            attention, slot = layer.self_attn, cache.layers[index]
            query, key, value = self.inputs[index](normed)
            norms = ()
            if hasattr(attention, "q_norm"):
                norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
            query = self.rotate(query, key, value, cos, sin, columns, slot.keys, slot.values, *norms)
            seen = self.attend(query, slot.keys, slot.values, lengths, attention.scaling)
            out = attention.o_proj(seen.reshape(batch, window, -1))
            norm = layer.post_attention_layernorm
            normed, total = self.add_norm(out, total, norm.weight, norm.variance_epsilon)
            if self.gates[index] is not None:
                out = layer.mlp.down_proj(self.gate(*self.gates[index](normed)))
            else:
                out = layer.mlp(normed)
                out = out[0] if isinstance(out, tuple) else out
            norm = self.layers[index + 1].input_layernorm if index + 1 < len(self.layers) else self.norm
            normed, total = self.add_norm(out, total, norm.weight, norm.variance_epsilon)
        return self.head(normed.take_along_dim(keep[..., None], dim=1))

    def _is_gated(self, mlp: nn.Module) -> bool:
        return hasattr(mlp, "gate_proj") and self.config.hidden_act == "silu"
