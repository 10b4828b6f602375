"""A decoder of the library's run on our kernels, for the forward passes of decoding on a GPU."""

import weakref
from collections import Counter

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
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
from .canvas import Window
from .graphs import can_be_captured, lock

# That go through a feed-forward network at a time: its inside is three to five times as wide as the rest.
MOST_TOKENS = 8192
LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Qwen3MoeDecoderLayer)


class JointProducts:
    """Products of the same input, as one: three small ones leave a third of the memory's speed unused.

    Their weights are put side by side, and the parameters of the modules become parts of that memory, each with a
    storage of its own: nothing is stored twice, and whoever trains, saves or moves the modules finds what they always
    held. Where that cannot be (other modules than plain `nn.Linear`, no room for the second copy that exists for a
    moment, gradients, memory that others have as well) the modules run one by one.
    """

    def __init__(self, linears: list[nn.Module], is_shared: bool = False):
        """`is_shared`: some of the parameters belong to other products too."""
        self.linears = linears
        self.joint: list[torch.Tensor | None] = [None]
        plain = all(type(linear) is nn.Linear and "forward" not in vars(linear) for linear in linears)
        if plain and not is_shared and len({linear.bias is None for linear in linears}) == 1:
            self.sizes = [len(linear.weight) for linear in linears]
            names = ["weight"] if linears[0].bias is None else ["weight", "bias"]
            with lock:  # not beside another thread that does the same, or that captures
                self.joint = [_side_by_side(linears, name) for name in names]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if any(each is None for each in self.joint):
            return tuple(linear(x) for linear in self.linears)
        return nn.functional.linear(x, *self.joint).split(self.sizes, dim=-1)


# Of the first module of each group, the memory in which its parameters and those of its neighbours stand, not held.
_joined: "weakref.WeakKeyDictionary[nn.Module, dict[str, StorageWeakRef]]" = weakref.WeakKeyDictionary()


def _side_by_side(linears: list[nn.Linear], name: str) -> torch.Tensor | None:
    """One tensor whose parts are the parameters of this name; they are made so if they can be."""
    parameters = [getattr(linear, name) for linear in linears]
    first = parameters[0]
    if any(type(each) is not nn.Parameter or not each.is_contiguous() for each in parameters):
        return None
    if len({(each.dtype, each.device, each.shape[1:]) for each in parameters}) > 1:
        return None
    if any(each.is_inference() for each in parameters):
        return None
    if not first.is_floating_point() or len({each.data_ptr() for each in parameters}) < len(parameters):
        return None
    sizes = [each.shape[0] for each in parameters]
    shape = (sum(sizes), *first.shape[1:])

    reference = _joined.get(linears[0], {}).get(name)
    storage = None if reference is None else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    if storage is not None and (storage.nbytes(), storage.data_ptr()) == (_bytes(parameters), first.data_ptr()):
        joint = torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, shape)
        if [part.data_ptr() for part in joint.split(sizes)] == [each.data_ptr() for each in parameters]:
            return joint

    if any(each.grad is not None or not _is_alone(each) for each in parameters):
        return None
    if first.is_cuda and torch.cuda.mem_get_info(first.device)[0] < 2 * _bytes(parameters):
        return None
    with torch.inference_mode(False), torch.no_grad():
        try:
            joint = torch.cat([each.data for each in parameters])
        except torch.OutOfMemoryError:
            return None
        for each, part in zip(parameters, joint.split(sizes), strict=True):
            # Not a view: those who save weights take one storage for one tensor, and would leave out the others.
            each.data = torch.from_dlpack(part)
    _joined.setdefault(linears[0], {})[name] = StorageWeakRef(joint.untyped_storage())
    if first.is_cuda:
        torch.cuda.empty_cache()  # else the holes that they leave, which fit nothing, add up to half of the model
    return joint


def _is_alone(parameter: nn.Parameter) -> bool:
    """Whether it is all of its storage, and nothing else has this storage: another model, a `state_dict()`."""
    storage = parameter.untyped_storage()
    return storage.nbytes() == parameter.nbytes and torch._C._storage_Use_Count(storage._cdata) <= 2


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(each.nbytes for each in parameters)


def is_patched(stack: nn.Module) -> bool:
    """Whether a module has another forward pass than its class. Linear ones are asked when they are used."""
    return any("forward" in vars(module) for module in stack.modules() if not isinstance(module, nn.Linear))


def is_divided(model: nn.Module) -> bool:
    """Whether other processes hold parts of the weights (`DTensor`), as with `tp_plan`: the modules' sizes are then not those
    of what they compute, and a step waits for the others."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


class FusedStack:
    """Embeddings, layers, last norm and head of a model.

    Holds the parts of the model and not the model, so that something kept for a model may hold it.
    """

    def __init__(self, stack: PreTrainedModel, head: nn.Module):
        self.embed, self.layers, self.norm, self.rotary = stack.embed_tokens, stack.layers, stack.norm, stack.rotary_emb
        self.head, self.config, self.dtype = head, stack.config, stack.dtype
        inputs = [self.inputs_of(layer.self_attn) for layer in self.layers]
        gates = [[layer.mlp.gate_proj, layer.mlp.up_proj] if self._is_gated(layer.mlp) else [] for layer in self.layers]
        groups = [group for of_layer in inputs for group in of_layer] + gates
        uses = Counter(id(parameter) for group in groups for linear in group for parameter in linear.parameters())

        def join(group: list[nn.Module]) -> JointProducts:
            return JointProducts(group, any(uses[id(p)] > 1 for linear in group for p in linear.parameters()))

        self.inputs = [[join(group) for group in of_layer] for of_layer in inputs]
        self.gates = [join(group) if group else None for group in gates]
        # The twins serve a machine without a GPU: the tests.
        self.is_fused = next(head.parameters()).is_cuda
        self.add_norm = add_rms_norm if self.is_fused else add_rms_norm_torch
        self.rotate = rotate_and_store if self.is_fused else rotate_and_store_torch
        self.look = canvas_attention if self.is_fused else canvas_attention_torch
        self.gate = swiglu if self.is_fused else swiglu_torch

    def inputs_of(self, attention: nn.Module) -> list[list[nn.Module]]:
        """The modules that an attention's input goes through, in groups that can be one product each."""
        return [[getattr(attention, f"{name}_proj") for name in "qkv"]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FusedStack | None":
        """None where the model has something that the kernels do not know: adapters, hooks, other attention than
        theirs or SDPA (which nobody asked for in particular), parts on several devices or in several processes."""
        stack, config = model.model, model.config
        if config._attn_implementation not in ("sdpa", "canvas") or not can_be_captured(model) or is_patched(stack):
            return None
        if is_divided(model):
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

    def covers(self, window: Window) -> bool:
        """Whether it does all that a window asks for. Keys are written wherever the window stands."""
        return True

    def prepare(self, cache: CanvasCache, batch: int) -> None:
        """Allocate the cache of `batch` rows: what is captured or compiled must find it."""
        for layer, slot in zip(self.layers, cache.layers, strict=True):
            if not slot.is_initialized:
                size = layer.self_attn.head_dim
                shape = (batch, layer.self_attn.k_proj.out_features // size, 0, size)
                nothing = torch.empty(shape, dtype=self.dtype, device=layer.input_layernorm.weight.device)
                slot.lazy_initialization(nothing, nothing)

    def __call__(
        self,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        lengths: torch.Tensor,
        keep: torch.Tensor,
        settled: torch.Tensor,
        cache: CanvasCache,
    ) -> torch.Tensor:
        """Args:
            tokens, columns: `(batch, window)`. Keys and values of the window go into these columns of the cache.
            lengths: `(batch, window)` int32, the columns that each token sees.
            keep: `(batch, kept)`, indices into the window.
            settled: `(batch, 1)`, the column up to which the canvas is final.

        Returns:
            Logits, `(batch, kept, vocab)`.
        """
        return self.head(self.last_hidden(tokens, columns, lengths, cache, keep))

    def last_hidden(self, tokens, columns, lengths, cache: CanvasCache, keep=None) -> torch.Tensor:
        """Behind the last norm: `(batch, kept, hidden)`, or `(batch, window, hidden)` without `keep`."""
        total = self.embed(tokens)
        cos, sin = (x.expand(len(tokens), -1, -1).contiguous() for x in self.rotary(total, columns))
        normed, total = self._add_norm(total, None, self.layers[0].input_layernorm)
        for index, layer in enumerate(self.layers):
            attended = self.attend(index, normed, cos, sin, columns, lengths, cache)
            if keep is not None and index + 1 == len(self.layers):
                # What the cache needs is there; the rest is for those who are asked for.
                attended, total = (x.take_along_dim(keep[..., None], dim=1) for x in (attended, total))
                if not total.numel():  # nobody is
                    return total
            normed, total = self._add_norm(layer.self_attn.o_proj(attended), total, layer.post_attention_layernorm)
            norm = self.layers[index + 1].input_layernorm if index + 1 < len(self.layers) else self.norm
            normed, total = self._add_norm(self._feed_forward(index, normed), total, norm)
        return normed

    def attend(self, index: int, normed, cos, sin, columns, lengths, cache: CanvasCache) -> torch.Tensor:
        """Attention of a layer without `o_proj`: `(batch, window, hidden)` -> `(batch, window, heads * head_dim)`."""
        attention, slot = self.layers[index].self_attn, cache.layers[index]
        query, key, value = self.inputs[index][0](normed)
        norms = ()
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
        query = self.rotate(query, key, value, cos, sin, columns, slot.keys, slot.values, *norms)
        return self.look(query, slot.keys, slot.values, lengths, attention.scaling).flatten(2)

    def _add_norm(self, x: torch.Tensor, residual: torch.Tensor | None, norm: nn.Module):
        return self.add_norm(x, residual, norm.weight, norm.variance_epsilon)

    def _feed_forward(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        mlp, gates = self.layers[index].mlp, self.gates[index]
        if gates is None:
            out = mlp(normed)
            return out[0] if isinstance(out, tuple) else out
        tokens = normed.flatten(0, 1)
        if len(tokens) <= MOST_TOKENS:
            return mlp.down_proj(self.gate(*gates(normed)))
        out = torch.empty_like(tokens)
        for piece, result in zip(tokens.split(MOST_TOKENS), out.split(MOST_TOKENS), strict=True):
            result.copy_(mlp.down_proj(self.gate(*gates(piece[None])))[0])
        return out.view_as(normed)

    def _is_gated(self, mlp: nn.Module) -> bool:
        return hasattr(mlp, "gate_proj") and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))
