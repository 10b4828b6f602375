"""A denoising step of GLADream on our kernels. The block being decoded reads the states and does not change them; in its
first step the finished block before it moves them on. A layer takes ten launches instead of sixty, eleven with short
convolutions.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..fused.stack import FusedStack, can_be_captured, is_patched
from ..generation.window import Window
from .attention_gla_dream import convolutions_of
from .generation_utils_gla_dream import GLADreamCache, is_step
from .kernels_gla_dream import (
    LARGEST,
    mix_scans,
    mix_scans_torch,
    move_states,
    move_states_torch,
    read_block,
    read_block_torch,
    short_convolutions,
    short_convolutions_torch,
)


class FusedGLADream(FusedStack):
    """The [`FusedStack`] of a GLADream, for windows of one block or two."""

    takes_lists = False

    def __init__(self, model: Any):
        super().__init__(model)
        self.convolve = short_convolutions if self.is_fused else short_convolutions_torch
        self.read = read_block if self.is_fused else read_block_torch
        self.mix = mix_scans if self.is_fused else mix_scans_torch
        self.move = move_states if self.is_fused else move_states_torch

    def inputs_of(self, attention: Any) -> list[list[nn.Module]]:
        (inputs,), others = super().inputs_of(attention), [attention.g_proj, attention.gk_proj[0]]
        # A joint product needs all biases or none.
        return [inputs, others] if self.config.attention_bias else [inputs + others]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FusedGLADream | None":
        """None where the kernels do not cover the model, or its `attn_mode` names another implementation. The caller has
        checked that the layers are those of [`GLADreamModel`]."""
        stack: Any = model.model
        config = model.config
        if config.attn_mode != "auto" or not can_be_captured(model) or is_patched(model):
            return None
        sizes = (config.block_size, config.head_dim, config.head_v_dim, config.gate_low_rank_dim)
        if any(size > most for size, most in zip(sizes, LARGEST, strict=True)) or model.dtype == torch.float64:
            return None
        norms, decays = [stack.norm], [layer.self_attn.gk_proj[1] for layer in stack.layers]
        for layer in stack.layers:
            norms += [layer.self_attn.g_norm_swish_gate, layer.input_layernorm, layer.post_attention_layernorm]
        if any(type(norm) is not nn.RMSNorm for norm in norms):
            return None
        # The kernels read these weights directly, which quantised ones do not support.
        parameters = [norm.weight for norm in norms]
        parameters += [parameter for decay in decays for parameter in (decay.weight, decay.bias)]
        parameters += [each.weight for layer in stack.layers for each in convolutions_of(layer.self_attn)]
        if any(type(each) is not nn.Parameter or each.dtype != model.dtype for each in parameters):
            return None
        return cls(model) if all(each.is_contiguous() for each in parameters) else None

    def covers(self, window: Window) -> bool:
        return is_step(window, self.config.block_size)

    def prepare(self, cache: GLADreamCache, slots: int) -> None:
        cache.allocate(self.config, slots, self.dtype, self.norm.weight.device)

    def attend(self, index: int, normed, angles, sees, cache: GLADreamCache) -> torch.Tensor:
        """`normed`: `(blocks * rows, block_size, hidden)`, block after block; `sees`: `slots` and `moves`, see
        [`move_states`]."""
        (cos, sin, _), (slots, moves) = angles, sees
        attention = self.layers[index].self_attn
        state: Any = cache.layers[index].state  # allocated by `prepare`
        query, key, value, gate, low_rank = (out for product in self.inputs[index] for out in product(normed))
        if convolutions := convolutions_of(attention):
            query, key, value = self.convolve((query, key, value), [each.weight for each in convolutions])
        decay, norm = attention.gk_proj[1], attention.g_norm_swish_gate

        def read(rows: slice, moves_on: bool):
            return self.read(
                query[rows], key[rows], value[rows], low_rank[rows], decay.weight, decay.bias, cos[rows], sin[rows], state,
                slots, norm.weight, norm.eps, self.config.gate_logit_normalizer,
                self.config.inter_block_injection_mode == "global", moves_on,
            )  # fmt: skip

        finished = len(cos) - len(slots)
        if finished:
            before, last_states, log_decays, last_outputs = read(slice(finished), True)
            shares = self.config.share_inter_intra_gate_weights
            gate_logits = (attention.intra_gate_proj if shares else attention.inter_gate_proj)(last_outputs)
            self.move(state, slots, last_states, log_decays, gate_logits, moves)
        (scans,) = read(slice(finished, None), False)
        if finished:
            scans = torch.cat([before, scans])
        return self.mix(scans, attention.intra_gate_proj(scans), gate)

    def __call__(self, tokens: torch.Tensor, window: Window, cache: GLADreamCache) -> torch.Tensor:
        rows, size, slots = len(tokens), self.config.block_size, window.slots
        # A batch of blocks, the finished ones first.
        by_block = lambda x: x.unflatten(1, (-1, size)).transpose(0, 1).flatten(0, 1)
        moves = (window.final > window.columns[:, :1])[:, 0]
        hidden_states = self.last_hidden(by_block(tokens), by_block(window.columns), (slots, moves), cache)
        hidden_states = hidden_states.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)
        if not self.config.logits_shift:
            return self.head(hidden_states.take_along_dim(window.keep[..., None], dim=1))
        with_before = cache.with_token_before(hidden_states, window)
        logits = self.head(with_before.take_along_dim(window.keep[..., None] + 1, dim=1))
        if hidden_states.shape[1] > size and cache.last_hidden is not None:
            last = torch.where(moves[:, None], hidden_states[:, size - 1], cache.last_hidden[slots])
            cache.last_hidden.index_copy_(0, slots, last)
        return logits

    def _norm_options(self, norm: Any) -> tuple[float, bool]:
        return norm.eps, True


class EagerStep:
    """The model's own forward pass as a step, where [`FusedGLADream`] does not cover the model."""

    takes_lists = False

    def __init__(self, model: PreTrainedModel):
        self.reference, self.size = weakref.ref(model), model.config.block_size

    @property
    def model(self) -> Any:
        return self.reference()

    def covers(self, window: Window) -> bool:
        return is_step(window, self.size)

    def prepare(self, cache: GLADreamCache, slots: int) -> None:
        cache.allocate(self.model.config, slots, self.model.dtype, self.model.device)

    def __call__(self, tokens: torch.Tensor, window: Window, cache: GLADreamCache) -> torch.Tensor:
        cache.set_window(window)
        return self.model(
            input_ids=tokens,
            position_ids=window.columns,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=window.keep,
        ).logits
