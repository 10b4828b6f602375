"""The forward pass of a decoder of transformers on our kernels, for decoding on a GPU."""

from collections import Counter
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.ministral3.modeling_ministral3 import Ministral3DecoderLayer, get_llama_4_attn_scale
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from ..generation.divided_head import VocabularyPart
from ..generation.ranks import divided_modules, local, ranks_of
from ..generation.remasking import select
from ..generation.window import Window, steps_after
from ..kernels.ahead import compiled_ahead, compiler_prepared
from ..kernels.best_tokens import best_tokens
from ..kernels.layers import add_rms_norm, add_rms_norm_torch, swiglu, swiglu_torch
from .experts import on_kernels
from .joint_products import JointProducts
from .quantized_products import QuantizedProducts
from .shared_sums import SharedSums

# Tokens in one call of a feed-forward network: limits the intermediate activation, 3 to 5 times the hidden size.
MLP_CHUNK = 8192
LAYERS: tuple[type, ...] = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Qwen3MoeDecoderLayer)
LAYERS += (Glm4MoeDecoderLayer, Ministral3DecoderLayer)


def can_be_captured(model: nn.Module) -> bool:
    """Whether a forward pass of the model launches the same kernels every time, as far as can be checked: no hooks, adapters
    (which can be switched off), parts on other devices or, but for tensor parallelism, in other processes (`DTensor`), or
    weights that autocast copies."""
    device, divided = next(model.parameters()).device, divided_modules(model)
    of_others = (each for module in model.modules() if module not in divided for each in module.parameters(False))
    if any(hasattr(parameter, "placements") for parameter in of_others):
        return False
    if torch.is_autocast_enabled(device.type) or {p.device for p in model.parameters()} != {device}:
        return False
    if any(hasattr(module, "_hf_hook") or hasattr(module, "base_layer") for module in model.modules()):
        return False  # of accelerate, and of PEFT
    if any(isinstance(module, nn.Linear) and not _is_plain(module) for module in divided):
        return False  # quantised: what a process holds of the weights is no factor of a product
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules() if module not in divided
    )


def _is_plain(linear: nn.Linear) -> bool:
    return type(linear) is nn.Linear and type(local(linear.weight)) in (nn.Parameter, torch.Tensor)


def is_patched(model: Any) -> bool:
    """Whether the `forward` of a module below the head is not that of its class. `JointProducts` checks linear modules."""
    modules = set(model.model.modules()) - divided_modules(model)
    return any("forward" in vars(module) for module in modules if not isinstance(module, nn.Linear))


class FusedStack:
    """Embeddings, layers, last norm and head of a model, without a reference to the model, so that an entry of a
    `WeakKeyDictionary` can be collected.

    Where the weights are divided between processes (`tp_plan`), each computes with what it holds: its heads, and its part of
    the inside of a feed-forward network; the sum over all processes is what follows.

    Attributes:
        part: of the vocabulary, whose logits this process computes; None where that is all of it.
    """

    takes_lists = True

    def __init__(self, model: Any):
        """`model`: with a head and a stack with `embed_tokens`, `layers`, `norm` and `rotary_emb`, as the library's
        decoders."""
        stack, self._lm_head = model.model, model.lm_head
        self.layers, self.norm, self.rotary, self._embedding = (
            stack.layers, stack.norm, stack.rotary_emb, stack.embed_tokens,
        )  # fmt: skip
        self.config, self.dtype = stack.config, stack.dtype
        self.ranks, self.divided = ranks_of(model), divided_modules(model)
        self.part = None if self.ranks is None else VocabularyPart(self.ranks, self.config.vocab_size)
        # Tests on a CPU run the torch twins.
        self.is_fused = self._lm_head.weight.is_cuda
        self.mixtures = [on_kernels(layer.mlp, self.divided, self.is_fused) for layer in self.layers]
        inputs = [self.inputs_of(layer.self_attn) for layer in self.layers]
        gates = [[layer.mlp.gate_proj, layer.mlp.up_proj] if self._is_gated(layer.mlp) else [] for layer in self.layers]
        groups = [group for of_layer in inputs for group in of_layer] + gates
        uses = Counter(id(parameter) for group in groups for linear in group for parameter in linear.parameters())

        def join(group: list[nn.Module]) -> JointProducts | QuantizedProducts:
            is_shared = any(uses[id(p)] > 1 for linear in group for p in linear.parameters())
            quantized = None if is_shared else QuantizedProducts.of(group)
            return quantized or JointProducts(group, is_shared, self.divided)

        with compiler_prepared() if self.is_fused else nullcontext():
            self.inputs = [[join(group) for group in of_layer] for of_layer in inputs]
            self.gates = [join(group) if group else None for group in gates]
        others = [self._lm_head]
        for layer in self.layers:
            found = [(layer.self_attn, "query_key_value"), (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")]
            others += [getattr(module, name) for module, name in found if hasattr(module, name)]
        products = {linear: QuantizedProducts.of([linear]) for linear in others}
        self.quantized = {linear: product for linear, product in products.items() if product is not None}
        self.add_norm = add_rms_norm if self.is_fused else add_rms_norm_torch
        self.gate = swiglu if self.is_fused else swiglu_torch
        self.seen: set[tuple] = set()  # shapes of passes whose kernels are compiled
        self.sums: SharedSums | None = None
        if self.ranks is not None and self.is_fused:
            self.sums = SharedSums.of(
                self.ranks, self.dtype, local(self._lm_head.weight).device, self.config.hidden_size
            )
        # Whether all that adds to the total are sums over all processes, so that of many tokens each needs its share alone.
        self.divides_total = self.sums is not None and all(map(self._is_summed, range(len(self.layers))))

    def inputs_of(self, attention: Any) -> list[list[nn.Module]]:
        """The modules that read an attention's input, in groups that can be joint products."""
        return [] if hasattr(attention, "query_key_value") else [[getattr(attention, f"{name}_proj") for name in "qkv"]]

    def projected(self, index: int, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a layer, `(rows, window, heads * head_dim)` each."""
        attention = self.layers[index].self_attn
        if not self.inputs[index]:  # a model whose product is one from the beginning
            return self._product(attention.query_key_value, normed).split(attention.sizes, dim=-1)
        return self.inputs[index][0](normed)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FusedStack | None":
        """None where the kernels do not cover the model: adapters, hooks, an attention other than SDPA or `canvas`, parts on
        several devices."""
        stack: Any = model.model
        config = model.config
        if config._attn_implementation not in ("sdpa", "canvas") or not can_be_captured(model) or is_patched(model):
            return None
        if (config.rope_parameters or {}).get("rope_type", "default") in ("dynamic", "longrope"):
            return None  # they read the positions on the host
        for layer in stack.layers:
            attention = layer.self_attn
            inputs = ["query_key_value"] if hasattr(attention, "query_key_value") else ["q_proj", "k_proj", "v_proj"]
            projections = [getattr(attention, name) for name in [*inputs, "o_proj"]]
            if not isinstance(layer, LAYERS) or getattr(attention, "sliding_window", None) is not None:
                return None
            if not all(isinstance(projection, nn.Linear) for projection in projections):
                return None
        return cls(model)

    def covers(self, window: Window) -> bool:
        """Whether it can run a pass over the window."""
        return True

    def repeats(self, window: Window) -> bool:
        """See [`StepForward`]."""
        return True

    def prepare(self, cache: Any, slots: int) -> None:
        """Allocate the cache before a pass is captured or compiled."""
        for layer, slot in zip(self.layers, cache.layers, strict=True):
            if not slot.is_initialized:
                attention = layer.self_attn
                heads = self.config.num_key_value_heads
                if hasattr(attention, "k_proj"):  # of which a process may have a part
                    heads = len(local(attention.k_proj.weight)) // attention.head_dim
                shape = (slots, heads, 0, attention.head_dim)
                nothing = torch.empty(shape, dtype=self.dtype, device=layer.input_layernorm.weight.device)
                slot.lazy_initialization(nothing, nothing)

    def __call__(self, tokens: torch.Tensor, window: Window, cache: Any) -> torch.Tensor:
        """A forward pass that writes keys and values of its window, a list, into the cache: `(tokens,)` tokens ->
        `(rows, kept, vocab)` logits."""
        if self.is_fused and not torch.compiler.is_compiling():
            self._compile_for(tokens, window, cache)
        base, shared, own, columns = cache.locate(window)
        runs = (window.runs, window.longest, shared, own, cache.cascade(window))
        sees = (base, window.lengths[None], columns[None], *runs)
        keep = window.keep.reshape(1, window.keep.numel())
        hidden_states = self.last_hidden(tokens[None], window.columns[None], sees, cache, keep)[0]
        return self.head(hidden_states).unflatten(0, window.keep.shape)

    def _compile_for(self, tokens: torch.Tensor, window: Window, cache: Any) -> None:
        """Make the kernels of a pass of these shapes ready, side by side, and those of the steps that follow: one after the
        other, as they are launched, they take seconds where none is in Triton's cache."""
        parts = ("columns", "keep", "runs", "pieces")
        shapes = lambda each: (*(getattr(each, name).shape for name in parts), each.longest, each.draft_columns)
        extent = cache.longest_extent
        if (extent, *shapes(window)) in self.seen or torch.cuda.is_current_stream_capturing():
            return
        first = copy(self)
        first.layers = self.layers[:2]  # which launch all that the others do; what they write, the pass overwrites
        with compiled_ahead():
            for each in (window, *steps_after(window)):
                self.seen.add((extent, *shapes(each)))
                logits = first(tokens[: len(each.columns)], each, cache)
                if logits.numel():
                    best, scores, *_ = best_tokens(logits, 0)
                    masked, first_best, bounds = scores > 0, best[:, :1], [scores[:, :1]] * 3
                    select(frozenset(["quota"]), first_best, scores, masked[:, :1], masked, first_best, *bounds)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(rows, window)` -> `(rows, window, hidden)` twice: the first layer's norm of the embeddings, and these."""
        weight, part, norm = local(self._embedding.weight), self.part, self.layers[0].input_layernorm
        if part is None or self.ranks is None or len(weight) == part.vocab_size:
            return self._add_norm(nn.functional.embedding(tokens, weight), None, norm, self._reads_float8(0))
        index = part.index(tokens)
        own = nn.functional.embedding(index.clamp(min=0), weight).masked_fill_((index < 0)[..., None], 0)
        if self.sums is None or not self.sums.covers(own):
            return self._add_norm(self.ranks.all_reduce(own), None, norm)
        is_whole = not self.divides_total or len(self.layers) == 1
        return self.sums.sum_and_norm(own, torch.zeros_like(own), norm, *self._norm_options(norm), is_whole)

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden)` -> `(..., vocab)`, or the `part` of it."""
        head, part = self._lm_head, self.part
        if part is None:
            return self._product(head, hidden_states)
        parameters = [local(each) for each in (head.weight, head.bias) if each is not None]
        if len(parameters[0]) == part.vocab_size:  # tied to the embedding, which is whole
            parameters = [each[part.begin : part.end] for each in parameters]
        return nn.functional.linear(hidden_states, *parameters)

    def last_hidden(self, tokens, columns, sees, cache: Any, keep=None) -> torch.Tensor:
        """The output of the last norm: `(rows, kept, hidden)`, or `(rows, window, hidden)` without `keep`. `sees`: see
        [`FusedStack.attend`]."""
        if self.sums is not None:
            self.sums.begin()
        normed, total = self.embed(tokens)
        cos, sin = (x.expand(len(tokens), -1, -1).contiguous() for x in self.rotary(total, columns))
        angles = (cos, sin, self.query_scales(columns, cache))
        for index, layer in enumerate(self.layers):
            attended = self.attend(index, normed, angles, sees, cache)
            if keep is not None and index + 1 == len(self.layers):
                # Last layer: only the kept positions need more than keys and values.
                attended, total = (x.take_along_dim(keep[..., None], dim=1) for x in (attended, total))
                if not total.numel():  # none kept: prefill
                    return total
            norm, gates = layer.post_attention_layernorm, self.gates[index]
            is_float8 = gates is not None and gates.takes_float8 and total.shape[:-1].numel() <= MLP_CHUNK
            is_whole = not self.divides_total
            normed, total = self._project(layer.self_attn.o_proj, attended, total, norm, is_float8, is_whole)
            norm = self.layers[index + 1].input_layernorm if index + 1 < len(self.layers) else self.norm
            is_whole |= index + 2 == len(self.layers)  # the last layer selects tokens
            normed, total = self._feed_forward(index, normed, total, norm, self._reads_float8(index + 1), is_whole)
        return normed

    def _reads_float8(self, index: int) -> bool:
        """Whether nothing of a layer's attention needs its input in more than 8 bits."""
        products = self.inputs[index] if index < len(self.layers) else []
        return bool(products) and all(product.takes_float8 for product in products)

    def query_scales(self, columns: torch.Tensor, cache: Any) -> torch.Tensor | None:
        """`(rows, window, 1, 1)`, what the rotated queries of Ministral 3 are multiplied with; None where that is 1 in every
        column of the cache."""
        rope: Any = self.config.rope_parameters or {}
        beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        if not beta or cache.longest_extent <= length + 1:  # + 1: the scratch column
            return None
        return get_llama_4_attn_scale(columns, beta, length).transpose(1, 2).to(self.dtype)

    def attend(self, index: int, normed, angles, sees, cache: Any) -> torch.Tensor:
        """Attention of a layer without `o_proj`: `(rows, window, hidden)` -> `(rows, window, heads * head_dim)`.

        Args:
            angles: cosines and sines of the positions, `(rows, window, head_dim)`, and [`FusedStack.query_scales`].
            sees: where the canvas of each run begins in the arena of the cache, `(runs,)`; the number of its columns that
                each token sees, `(rows, window)` int32; the column of each token in the arena, `(rows, window)`; the runs,
                the longest of them, the columns that they share and have for themselves, and what they read together, see
                [`canvas_attention`].
        """
        attention, slot = self.layers[index].self_attn, cache.layers[index]
        query, key, value = self.projected(index, normed)
        norms: tuple = ()
        if not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity):
            norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
        (base, lengths, columns, *runs), (cos, sin, scales) = sees, angles
        query = slot.rotate_and_write(query, key, value, cos, sin, columns, *norms)
        query = query if scales is None else query * scales
        return slot.attend(query, lengths, base, cache.longest_extent, attention.scaling, *runs).flatten(2)

    def _add_norm(self, x: torch.Tensor, residual: torch.Tensor | None, norm: Any, is_float8: bool = False):
        return self.add_norm(x, residual, norm.weight, *self._norm_options(norm), is_float8)

    def _norm_options(self, norm: Any) -> tuple[float, bool]:
        """`eps` and `rounds_once`, see [`add_rms_norm`]."""
        return norm.variance_epsilon, False

    def _product(self, linear: nn.Linear, x: Any) -> torch.Tensor:
        quantized = self.quantized.get(linear)
        return linear(x) if quantized is None else quantized.product(x)

    def _is_summed(self, index: int) -> bool:
        """Whether both that a layer adds to the total are sums of [`SharedSums`]."""
        layer, has_gates = self.layers[index], self.gates[index] is not None
        linears = [layer.self_attn.o_proj, layer.mlp.down_proj] if has_gates else [layer.self_attn.o_proj]
        is_divided = all(linear in self.divided and linear.bias is None for linear in linears)
        return is_divided and (has_gates or self.mixtures[index] is not None)

    def _project(
        self, linear: nn.Linear, x: Any, total: torch.Tensor, norm: Any, is_float8: bool, is_whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a product to `total`: the norm of the sum, in 8 bits or not, and the sum. Where the input is divided between
        processes, so is the sum over it. `is_whole`: see [`SharedSums.product_and_norm`]."""
        if self.ranks is None or linear not in self.divided:
            return self._add_norm(self._product(linear, x), total, norm, is_float8)
        weight, sums = local(linear.weight), self.sums
        if sums is not None and sums.covers(total) and linear.bias is None:
            return sums.product_and_norm(weight, x, total, norm, *self._norm_options(norm), is_whole)
        out = self.ranks.all_reduce(nn.functional.linear(x, weight))
        return self._add_norm(out if linear.bias is None else out + local(linear.bias), total, norm)

    def _feed_forward(
        self, index: int, normed: Any, total: torch.Tensor, norm: Any, is_float8: bool, is_whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what a feed-forward network makes of `normed` to `total`: as [`FusedStack._project`]."""
        mlp, gates, sums = self.layers[index].mlp, self.gates[index], self.sums
        if gates is None:
            mixture = self.mixtures[index]
            out = self.network(index, normed)
            if mixture is None or self.ranks is None:
                return self._add_norm(out, total, norm, is_float8)
            if sums is not None and sums.covers(total):
                return sums.sum_and_norm(out, total, norm, *self._norm_options(norm), is_whole)
            return self._add_norm(self.ranks.all_reduce(out.contiguous()), total, norm)
        if total.shape[:-1].numel() <= MLP_CHUNK:
            down = self.quantized.get(mlp.down_proj)
            gate, up = gates(normed)
            inside = self.gate(gate, up, down is not None and down.takes_float8)
            return self._project(mlp.down_proj, inside, total, norm, is_float8, is_whole)
        tokens = normed.flatten(0, 1)
        pieces = (each[None] for each in tokens.split(MLP_CHUNK))
        out = torch.empty_like(tokens)
        for piece, result in zip(pieces, out.split(MLP_CHUNK), strict=True):
            result.copy_(self.network(index, piece)[0])
        if self.ranks is not None:
            out = self.ranks.all_reduce(out)
            out = out if mlp.down_proj.bias is None else out + local(mlp.down_proj.bias)
        return self._add_norm(out.view_as(normed), total, norm, is_float8)

    def network(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the feed-forward network of a layer makes of `(1, tokens, hidden)`. Where it is divided between processes, that of
        this one, without what is added to the sum over all."""
        mlp, gates = self.layers[index].mlp, self.gates[index]
        if gates is None:
            out = (self.mixtures[index] or mlp)(x)
            return out[0] if isinstance(out, tuple) else out
        gate, up = gates(x)
        inside = self.gate(gate, up)
        if self.ranks is None:
            return self._product(mlp.down_proj, inside)
        return nn.functional.linear(inside, local(mlp.down_proj.weight))

    def _is_gated(self, mlp: nn.Module) -> bool:
        return hasattr(mlp, "gate_proj") and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))
