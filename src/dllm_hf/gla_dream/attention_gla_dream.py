"""GLADream's attention: gated linear attention (arXiv:2312.06635) in both directions inside a block, and from block to
block. The unit between blocks carries a state, a matrix for each head. It depends linearly on the state one block before,
so that all blocks of a prompt, or of a training sequence, are computed at once.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from .block_layout import BlockLayout
from .configuration_gla_dream import GLADreamConfig
from .gated_linear_attention import MIN_LOG_DECAY, block_scans, block_states, short_convolution
from .generation_utils_gla_dream import GLADreamCache
from .scan_kernels import block_reads, takes_reads

# Steps after which a token has faded to 1/e before training: `SHORT_MEMORY` in three quarters of the heads, in the others
# spread evenly between `LONG_MEMORIES` on a logarithmic scale.
SHORT_MEMORY, LONG_MEMORIES = 4.0, (64.0, 8192.0)


class DecayProjection(nn.Linear):
    """Projection to the logits of the decays, of which every `head_dim` belong to a head."""

    def __init__(self, in_features: int, out_features: int, head_dim: int):
        super().__init__(in_features, out_features)
        self.head_dim = head_dim

    def memory_bias(self, gate_logit_normalizer: float) -> torch.Tensor:
        """The biases before training. Most heads read neighbours, which is learnt quickly, and some keep a token for
        thousands of steps: without them distant tokens would have no gradient."""
        heads = self.out_features // self.head_dim
        long = max(heads // 4, 1) if heads > 1 else 0
        shortest, longest = LONG_MEMORIES
        fractions = (torch.arange(long, device=self.bias.device) + 0.5) / max(long, 1)
        steps = F.pad(shortest * (longest / shortest) ** fractions, (heads - long, 0), value=SHORT_MEMORY)
        # What is kept in each step, exp(logsigmoid(bias) / gate_logit_normalizer), is exp(-1 / steps).
        return torch.exp(-gate_logit_normalizer / steps).logit().repeat_interleave(self.head_dim)


class ShortConvolution(nn.Conv1d):
    """See [`short_convolution`]."""

    def __init__(self, channels: int, size: int):
        super().__init__(channels, channels, size, groups=channels, bias=False)

    def initial_weight(self) -> torch.Tensor:
        """The noise of `torch`'s and `fla`'s initialisation plus the identity, without which tokens are mixed before
        anything is learnt, and recall comes much later."""
        size = self.kernel_size[0]
        weight = torch.empty_like(self.weight).uniform_(-(size**-0.5), size**-0.5)
        weight[..., size // 2] += 1
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return short_convolution(x, self.weight)


class GLADreamAttention(nn.Module):
    """The unit inside a block and the unit between blocks. Parameters are named as in
    `fla.layers.GatedLinearAttention`, where it has them."""

    def __init__(self, config: GLADreamConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_k_dim, self.head_v_dim = (
            config.num_attention_heads,
            config.head_k_dim,
            config.head_v_dim,
        )
        kv_heads: int = config.num_key_value_heads  # type: ignore[assignment]  # the configuration has filled it in
        hidden, bias = config.hidden_size, config.attention_bias
        self.groups = self.num_heads // kv_heads
        value_dim = self.num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_k_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_k_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_v_dim, bias=bias)
        if config.conv_size:
            self.q_conv1d = ShortConvolution(self.q_proj.out_features, config.conv_size)
            self.k_conv1d = ShortConvolution(self.k_proj.out_features, config.conv_size)
            self.v_conv1d = ShortConvolution(self.v_proj.out_features, config.conv_size)
        self.g_proj = nn.Linear(hidden, value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden, config.gate_low_rank_dim, bias=False),
            DecayProjection(config.gate_low_rank_dim, kv_heads * self.head_k_dim, self.head_k_dim),
        )
        self.g_norm_swish_gate = nn.RMSNorm(self.head_v_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden, bias=False)
        self.intra_gate_proj = nn.Linear(2 * value_dim, value_dim, bias=False)
        if not config.share_inter_intra_gate_weights:
            self.inter_gate_proj = nn.Linear(2 * value_dim, value_dim, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        layout: BlockLayout,
        cache: GLADreamCache | None = None,
    ) -> torch.Tensor:
        """`hidden_states`: `(rows, blocks * block_size, hidden)`."""
        rows, width = hidden_states.shape[:2]
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if convolutions := convolutions_of(self):
            query, key, value = (
                self._convolved(each, x, layout) for each, x in zip(convolutions, (query, key, value), strict=True)
            )
        query = query.view(rows, width, self.num_heads, self.head_k_dim)
        key = key.view(rows, width, -1, self.head_k_dim)
        value = value.view(rows, width, -1, self.head_v_dim)
        log_decay = F.logsigmoid(self.gk_proj(hidden_states).float()).view(key.shape)
        # Clamped for every implementation, so that all of them compute the same.
        log_decay = (log_decay / self.config.gate_logit_normalizer).clamp(min=MIN_LOG_DECAY)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the positions are wider
        if layout.valid is not None:
            # Without a token nothing enters a state and nothing decays.
            empty = ~layout.valid[..., None, None]
            key, log_decay = key.masked_fill(empty, 0), log_decay.masked_fill(empty, 0)
        if self.groups > 1:
            key, value, log_decay = (x.repeat_interleave(self.groups, dim=2) for x in (key, value, log_decay))

        query, key, value, log_decay = (
            x.reshape(rows * layout.blocks, -1, *x.shape[2:]) for x in (query, key, value, log_decay)
        )
        needs_states = layout.final is not None or layout.blocks > 1 or layout.clean_rows > 0
        forward, backward = block_scans(query, key, value, log_decay, self.config.attn_mode, rows)
        layer = None if cache is None else cache.layers[self.layer_idx]
        states = None if layer is None else layer.rows_of(layout.window)
        read, clean_rows = None, layout.clean_rows or rows
        if needs_states:
            samples = None if layout.samples is None else layout.samples[rows - clean_rows :]
            added = self._added(layout.blocks, clean_rows, forward, backward, key, value, log_decay)
            if layer is None and self.config.attn_mode == "auto" and takes_reads(*added[:2]):
                is_exact = value.dtype == torch.float32
                read = lambda queries: block_reads(queries, *added, samples, is_exact)
            else:
                keys, values, total = added
                with torch.autocast(key.device.type, enabled=False):
                    states, last = block_states(keys.mT @ values, total, states, samples)
                if layer is not None and layout.final is not None:
                    every = torch.cat([states, last[:, None]], dim=1)
                    after = every.gather(1, layout.final.view(-1, 1, 1, 1, 1).expand(-1, 1, *last.shape[1:]))[:, 0]
                    layer.update(after, forward.dtype, layout.window)
        elif states is not None:
            states = states[:, None]
        if states is not None:
            read = lambda queries: queries.to(states.dtype) @ states
        if read is not None:
            from_start, from_end = self._injected(query, log_decay, (clean_rows, layout.blocks), read)
            forward, backward = forward + from_start, backward + from_end
        output, _ = self._mix(self.intra_gate_proj, forward, backward)
        output = output.reshape(rows, width, -1) * F.silu(self.g_proj(hidden_states))
        return self.o_proj(output)

    def _convolved(self, convolution: ShortConvolution, x: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
        """The convolution of `(rows, blocks * block_size, channels)`, each block by itself."""
        if layout.valid is not None:
            x = x.masked_fill(~layout.valid[..., None], 0)
        blocks = x.reshape(x.shape[0] * layout.blocks, -1, x.shape[-1])
        return convolution(blocks).reshape(x.shape)

    def _mix(self, gate_proj: nn.Linear, forward: torch.Tensor, backward: torch.Tensor):
        """`gate * norm(forward) + (1 - gate) * norm(backward)`, and the gate, for scans `(..., heads, head_v_dim)`."""
        norm = self.g_norm_swish_gate
        forward, backward = (norm(x.to(norm.weight.dtype)) for x in (forward, backward))
        gate = gate_proj(torch.cat([forward.flatten(-2), backward.flatten(-2)], dim=-1)).sigmoid().view_as(forward)
        return torch.lerp(backward, forward, gate.to(backward.dtype)), gate

    def _added(
        self, blocks, clean_rows, forward, backward, key, value, log_decay
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The unit between blocks: what each adds to the state, as keys and values, `(rows, blocks, heads, 2 * block_size,
        key_dim)` and `value_dim`, and its log-decays, `(rows, blocks, heads, key_dim)`, of the clean rows if there are any.

        What a block adds to the state is `gate * end of the forward scan + (1 - gate) * end of the backward scan`, both
        from zeros. The gate is one of values, so that both are one product over twice the tokens: the ends, the largest
        tensors of a layer, are never there.

        Args:
            forward, backward: outputs of the scans from zeros, `(rows * blocks, block_size, heads, value_dim)`.
        """
        gate_proj = self.intra_gate_proj if self.config.share_inter_intra_gate_weights else self.inter_gate_proj
        unfold = lambda x: x.unflatten(0, (-1, blocks))[-clean_rows:]
        _, gate = self._mix(gate_proj, unfold(forward[:, -1]), unfold(backward[:, 0]))
        with torch.autocast(key.device.type, enabled=False):
            wide = torch.promote_types(value.dtype, torch.float32)
            key, value, decay = (unfold(x).to(wide).transpose(2, 3) for x in (key, value, log_decay))
            gate = gate.to(wide)[..., None, :]
            after = decay.cumsum(3)
            total = after[..., -1:, :]
            keys = torch.cat([key * (total - after).exp(), key * (after - decay).exp()], dim=3)
            values = torch.cat([gate * value, (1 - gate) * value], dim=3)
        return keys, values, total[..., 0, :]

    def _injected(self, query: torch.Tensor, log_decay: torch.Tensor, blocks: tuple[int, int], read):
        """What the forward and the backward scan add from the states, each `(rows * blocks, block_size, heads,
        head_v_dim)`. Noisy rows read the states of the clean ones behind them; `read` is given the queries of each."""
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            queries = (query * self.head_k_dim**-0.5).to(wide)
            is_global = self.config.inter_block_injection_mode == "global"
            if not is_global:
                decay = log_decay.to(wide)
                from_start = decay.cumsum(1)
                from_end = from_start[:, -1:] - from_start + decay
                queries = torch.cat([queries * from_start.exp(), queries * from_end.exp()], dim=1)
            # All that reads a state is one product, since the states are most of what a layer reads.
            queries = queries.unflatten(0, (-1, *blocks))
            runs = queries.shape[0]
            found = read(queries.permute(1, 2, 4, 0, 3, 5).flatten(3, 4)).unflatten(3, (runs, -1))
            found = found.permute(3, 0, 1, 4, 2, 5).flatten(0, 2).to(query.dtype)
        return (found, found) if is_global else found.chunk(2, dim=1)


def convolutions_of(attention: nn.Module) -> list[ShortConvolution]:
    """The short convolutions of queries, keys and values; none with `conv_size` 0."""
    return [getattr(attention, f"{name}_conv1d") for name in "qkv" if hasattr(attention, f"{name}_conv1d")]
