"""GLADream's passes on our kernels. In a denoising step the block being decoded reads the states and does not change them; in its
first step the finished block before it moves them on. A layer takes ten launches instead of sixty, eleven with short
convolutions. The blocks of a prompt move them on one after the other, and are read all at once.
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

# Of a prompt at once: before each of them there is a state, a megabyte in a layer of 16 heads of 128.
MOST_BLOCKS = 512


class FusedGLADream(FusedStack):
    """The [`FusedStack`] of a GLADream, for steps and for prompts."""

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

    def repeats(self, window: Window) -> bool:
        return is_step(window, self.config.block_size)

    def prepare(self, cache: GLADreamCache, slots: int) -> None:
        cache.allocate(self.config, slots, self.dtype, self.norm.weight.device)

    def attend(self, index: int, normed, angles, sees, cache: GLADreamCache) -> torch.Tensor:
        """`normed`: `(blocks * rows, block_size, hidden)`, in a step block after block, of prompts row after row; `sees`: `slots`
        and `moves`, see [`move_states`], and whether it is a step."""
        (cos, sin, _), (slots, moves, is_step) = angles, sees
        attention = self.layers[index].self_attn
        state: Any = cache.layers[index].state  # allocated by `prepare`
        query, key, value, gate, low_rank = (out for product in self.inputs[index] for out in product(normed))
        if convolutions := convolutions_of(attention):
            query, key, value = self.convolve((query, key, value), [each.weight for each in convolutions])
        decay, norm = attention.gk_proj[1], attention.g_norm_swish_gate

        def read(which: Any, state: torch.Tensor, slots: torch.Tensor, moves_on: bool):
            return self.read(
                query[which], key[which], value[which], low_rank[which], decay.weight, decay.bias, cos[which], sin[which],
                state, slots, norm.weight, norm.eps, self.config.gate_logit_normalizer,
                self.config.inter_block_injection_mode == "global", moves_on,
            )  # fmt: skip

        def move(ends, moves, keeps=False):
            last_states, log_decays, last_outputs = ends
            shares = self.config.share_inter_intra_gate_weights
            gate_logits = (attention.intra_gate_proj if shares else attention.inter_gate_proj)(last_outputs)
            return self.move(state, slots, last_states, log_decays, gate_logits, moves, keeps)

        if not is_step:
            scans = self._read_prompts(read, move, state, slots, moves, len(cos) // len(slots))
        elif finished := len(cos) - len(slots):
            before, *ends = read(slice(finished), state, slots, True)
            move(ends, moves)
            scans = torch.cat([before, *read(slice(finished, None), state, slots, False)])
        else:
            (scans,) = read(slice(None), state, slots, False)
        return self.mix(scans, attention.intra_gate_proj(scans), gate)

    @staticmethod
    def _read_prompts(read, move, state, slots, moves, blocks: int) -> torch.Tensor:
        """The scans of all blocks, each from the state before it, which the ends of those before it give."""
        rows, device, parts = len(slots), slots.device, []
        size = max(MOST_BLOCKS // rows, 1)
        for first in range(0, blocks, size):
            number = min(size, blocks - first)
            which: Any = slice(None)
            if number < blocks:
                which = torch.arange(rows * blocks, device=device).view(rows, -1)[:, first : first + number].flatten()
            _, *ends = read(which, state, slots.repeat_interleave(number), True)
            before = move(ends, (moves - first).clamp(0, number), keeps=True)
            (scans,) = read(which, before, torch.arange(len(before), device=device), False)
            parts.append(scans.unflatten(0, (rows, number)))
        return parts[0].flatten(0, 1) if len(parts) == 1 else torch.cat(parts, dim=1).flatten(0, 1)

    def __call__(self, tokens: torch.Tensor, window: Window, cache: GLADreamCache) -> torch.Tensor:
        size = self.config.block_size
        hidden_states, final = (self._step if self.repeats(window) else self._prompts)(tokens, window, cache)
        if not self.config.logits_shift:
            return self.head(hidden_states.take_along_dim(window.keep[..., None], dim=1))
        with_before = cache.with_token_before(hidden_states, window)
        logits = self.head(with_before.take_along_dim(window.keep[..., None] + 1, dim=1))
        if final is not None:
            cache.keep_last_hidden(hidden_states, final * size, window)
        return logits

    def _step(self, tokens: torch.Tensor, window: Window, cache: GLADreamCache) -> tuple[torch.Tensor, Any]:
        """The hidden states of a window of one block or two, and over how many of them the state of each row has moved, if it may
        have."""
        rows, size = len(tokens), self.config.block_size
        # A batch of blocks, the finished ones first.
        by_block = lambda x: x.unflatten(1, (-1, size)).transpose(0, 1).flatten(0, 1)
        moves = (window.final > window.columns[:, :1])[:, 0].long()
        sees = window.slots, moves.to(torch.int32), True
        hidden_states = self.last_hidden(by_block(tokens), by_block(window.columns), sees, cache)
        hidden_states = hidden_states.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)
        return hidden_states, moves if hidden_states.shape[1] > size else None

    def _prompts(self, tokens: torch.Tensor, window: Window, cache: GLADreamCache) -> tuple[torch.Tensor, Any]:
        """The same of longer windows, and of prompts alone. Rows may have fewer blocks than the window: its last column is repeated
        behind them, and no state moves there."""
        rows, size = len(tokens), self.config.block_size
        final = ((window.final - window.columns[:, :1]) // size).clamp(min=0)[:, 0]
        by_block = lambda x: x.reshape(-1, size)
        sees = window.slots, final.to(torch.int32), False
        hidden_states = self.last_hidden(by_block(tokens), by_block(window.columns), sees, cache)
        return hidden_states.view(rows, -1, hidden_states.shape[-1]), final

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

    def repeats(self, window: Window) -> bool:
        return True

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
