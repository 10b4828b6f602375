"""GLADream: block diffusion on gated linear attention.

A layer has three units: gated linear attention inside a block, in both directions; gated linear attention between
blocks, with a state ([`GLADreamAttention`] has both); and a feed-forward network.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RotaryEmbedding
from transformers.utils import ModelOutput, can_return_tuple

from ..block_diffusion import BlockDiffusionLM, check_clean_text
from ..fused.stack import can_be_captured
from ..generation.contract import StepForward
from ..generation.ranks import ranks_of
from ..modeling import counted_positions, is_clean, keep_positions, sample_ids, text_positions
from ..training.losses import masked_diffusion_loss
from ..training.noising import mask_complementary, mask_sequences
from .attention_gla_dream import DecayProjection, GLADreamAttention, ShortConvolution, convolutions_of
from .block_layout import BlockLayout, block_count, lay_out
from .configuration_gla_dream import GLADreamConfig
from .fused_gla_dream import EagerStep, FusedGLADream
from .gated_linear_attention import check_installed
from .generation_utils_gla_dream import GLADreamCache


class GLADreamDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: GLADreamConfig, layer_idx: int):
        super().__init__()
        self.self_attn = GLADreamAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, layout, cache=None) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, layout, cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GLADreamPreTrainedModel(PreTrainedModel):
    config: GLADreamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLADreamDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecayProjection):
            init.copy_(module.bias, module.memory_bias(self.config.gate_logit_normalizer))
        if isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.initial_weight())


class GLADreamBaseModel(GLADreamPreTrainedModel):
    """The stack of layers without the head (`GLADreamModel` has the head)."""

    def __init__(self, config: GLADreamConfig):
        super().__init__(config)
        check_installed(config.attn_mode)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GLADreamDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)  # type: ignore[arg-type]  # it reads fields that ours has
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: GLADreamCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        clean_rows: int = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            attention_mask: `(batch, length)`, 0 on padding.
            position_ids: `(batch, length)`; several samples packed into a row each start from 0. A block is
                `block_size` positions, from position 0 on.
            past_key_values: see [`GLADreamCache`].
            clean_rows: number of rows at the end that are the clean text of the rows before, which read its states;
                the noisy rows may be several runs of the clean ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("`input_ids` holds no token: pass at least one.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
            use_cache = use_cache and (attention_mask is None or bool(attention_mask.all()))
        cache = past_key_values
        if cache is None and use_cache:
            cache = GLADreamCache(self)
        if cache is not None and not hasattr(cache, "take_window"):
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__}, which holds keys and values: pass a `GLADreamCache`."
            )
        length = inputs_embeds.shape[1]
        if cache is None:
            layout = self._plain_layout(inputs_embeds, attention_mask, position_ids)
        else:
            inputs_embeds, layout = self._cached_layout(cache, inputs_embeds, attention_mask, position_ids)
        layout.clean_rows = clean_rows

        hidden_states = layout.to_blocks(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, layout.positions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        every = []  # filled on demand only, since it keeps the outputs of all layers in memory
        for layer in self.layers:
            if output_hidden_states:
                every.append(hidden_states)
            hidden_states = layer(hidden_states, position_embeddings, layout, cache)
        hidden_states = self.norm(hidden_states)
        if output_hidden_states:
            every.append(hidden_states)
        if cache is not None and layout.final is not None and self.config.logits_shift:
            cache.keep_last_hidden(hidden_states, layout.final * self.config.block_size, layout.window)
        total = inputs_embeds.shape[1]  # with the pending tokens of the cache
        without_pending = lambda x: layout.to_tokens(x, total)[:, total - length :]
        return BaseModelOutputWithPast(
            last_hidden_state=without_pending(hidden_states),
            past_key_values=cache,
            hidden_states=tuple(map(without_pending, every)) if output_hidden_states else None,
        )

    def _plain_layout(self, inputs_embeds, attention_mask, position_ids) -> BlockLayout:
        if attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"`attention_mask` must be `(batch, length)` = {tuple(inputs_embeds.shape[:2])}, but is "
                f"{tuple(attention_mask.shape)}: there is no attention that a larger mask could shape."
            )
        if attention_mask is None and position_ids is None:
            return self._contiguous_layout(0, inputs_embeds)
        counted = position_ids is None
        if not counted and (position_ids.shape[-1] != inputs_embeds.shape[1] or position_ids.is_floating_point()):
            raise ValueError(
                f"`position_ids` must be integers, `(batch, length)` = {tuple(inputs_embeds.shape[:2])}, but are "
                f"{tuple(position_ids.shape)}, {position_ids.dtype}."
            )
        if counted:
            position_ids = counted_positions(attention_mask)
        return lay_out(position_ids.expand(inputs_embeds.shape[:2]), attention_mask, self.config.block_size, counted)

    def _contiguous_layout(self, start: int, inputs_embeds: torch.Tensor) -> BlockLayout:
        length, size, device = inputs_embeds.shape[1], self.config.block_size, inputs_embeds.device
        blocks = block_count(length, size)
        columns = torch.arange(blocks * size, device=device)[None]
        is_full = isinstance(length, int) and length % size == 0  # no int: see `block_count`
        return BlockLayout(blocks, columns + start, None if is_full else columns < length)

    def _cached_layout(self, cache: GLADreamCache, inputs_embeds, attention_mask, position_ids):
        size = self.config.block_size
        window = cache.take_window()
        # The loop always passes positions with a window: without them the window is left from a call that failed.
        if window is not None and position_ids is not None:
            # Windows are whole blocks. Shorter rows repeat their last column in padding blocks, to which no index of
            # `keep` points.
            start = window.columns[:, :1]
            layout = self._contiguous_layout(0, inputs_embeds)
            layout.positions, layout.window = start + layout.positions, window
            if inputs_embeds.shape[1] > size or not window.keep.shape[1]:  # else it is only the block being decoded
                layout.final = ((window.final - start) // size).clamp(min=0)[:, 0]
            return inputs_embeds, layout

        if cache.state_length is None:
            raise ValueError(
                "`past_key_values` comes from a call whose rows ended at different columns, or that did not end: "
                "pass it to `diffusion_generate`, or start with a new cache."
            )
        past = cache.get_seq_length()
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "A cache and padding need the decoding loop, which knows where each row stands: call "
                "`diffusion_generate`, pass rows of equal length without padding, or `use_cache=False`."
            )
        expected = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)
        if position_ids is not None and (position_ids != expected).any():
            raise ValueError(
                f"`position_ids` must go on from {past}, where the cache stands: leave them out, or start with a new "
                "cache."
            )
        if cache.rows not in (None, len(inputs_embeds)):
            raise ValueError(
                f"`past_key_values` holds {cache.rows} rows, but the batch has {len(inputs_embeds)}: pass the rows that "
                "it was made with, or start with a new cache."
            )
        if cache.pending is not None:
            inputs_embeds = torch.cat([cache.pending, inputs_embeds], dim=1)
        layout = self._contiguous_layout(cache.state_length, inputs_embeds)
        rows, length, _ = inputs_embeds.shape
        if length >= size:
            layout.final = torch.full((rows,), length // size, device=inputs_embeds.device)
        cache.advance(length - length % size, inputs_embeds[:, length - length % size :])
        return inputs_embeds, layout


class GLADreamModel(BlockDiffusionLM, GLADreamPreTrainedModel):
    """GLADream with its head.

    With `labels`, all noisy blocks are denoised at once, each from the state after the clean blocks before it. If no
    labelled token is masked, the text is clean, and the noise is drawn here: one rate per sequence (packed: per sample),
    the loss weighted by its inverse, or complementary masks with `config.use_complementary_mask`, for which `logits` are
    those of the first.
    """

    base_model_class = GLADreamBaseModel
    model: GLADreamBaseModel
    replaces_attention = True
    makes_masks = False
    has_fixed_block_length = True  # the state moves on by whole blocks
    cache_dtypes = ()
    capacity_step = 4096  # the cache does not grow with its columns

    @property
    def logits_shift(self) -> int:  # type: ignore[override]  # of other families a constant of the class
        return self.config.logits_shift

    def make_cache(self, width: int) -> GLADreamCache:
        return GLADreamCache(self, width)

    def _forward_with_loss(
        self, input_ids, attention_mask, position_ids, labels, mask_ratio, num_items_in_batch, *, token_mask, **inputs
    ) -> ModelOutput:
        check_clean_text(input_ids, attention_mask, labels, **inputs)
        batch = len(input_ids)
        positions = text_positions(input_ids, attention_mask) if position_ids is None else position_ids
        labelled = labels != -100
        if attention_mask is not None:
            labelled = labelled & attention_mask.bool()
        clean, noisy = torch.where(labelled, labels, input_ids), input_ids
        if mask_ratio is None and is_clean(input_ids, labelled, self.config.mask_token_id):
            if num_items_in_batch is None:
                num_items_in_batch = labelled.sum()
            packed = position_ids is not None and attention_mask is None
            samples = sample_ids(positions.expand(batch, -1)) if packed else None
            noisy, labels, mask_ratio = self._add_noise(clean, labelled, positions, samples)
        views = len(noisy) // batch  # 2 with complementary masks
        repeat = lambda x, times: None if x is None else x.expand(batch, -1).repeat(times, 1)
        hidden_states, every = self._denoise(
            noisy, clean, attention_mask, position_ids, inputs.get("output_hidden_states")
        )
        logits, token_mask, positions = self.lm_head(hidden_states), repeat(token_mask, views), repeat(positions, views)
        loss = masked_diffusion_loss(
            logits, labels, self.logits_shift, mask_ratio, token_mask, num_items_in_batch, positions
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits[:batch],
            hidden_states=None if every is None else tuple(x[:batch] for x in every),
        )

    def predict_noisy(
        self, input_ids, attention_mask, labels, position_ids=None, *, logits_to_keep=0, **inputs
    ) -> ModelOutput:
        check_clean_text(input_ids, attention_mask, labels, **inputs)
        clean = torch.where(labels != -100, labels, input_ids)
        hidden_states, _ = self._denoise(input_ids, clean, attention_mask, position_ids)
        return CausalLMOutputWithPast(logits=self.lm_head(keep_positions(hidden_states, logits_to_keep)))

    def _denoise(self, noisy, clean, attention_mask, position_ids, output_hidden_states=None):
        """The hidden states of noisy texts, `(views * batch, length, hidden)`, from which their tokens are predicted, and those
        of all layers where they are asked for. `clean`: `(batch, length)`."""
        (batch, length), size = clean.shape, self.config.block_size
        views = len(noisy) // batch
        # One block has no clean block before it, whose state it could read.
        clean_rows = 0 if position_ids is None and length <= size else batch
        repeat = lambda x, times: None if x is None else x.expand(batch, -1).repeat(times, 1)
        runs = views + (clean_rows > 0)
        outputs = self.model(
            torch.cat([noisy, clean[:clean_rows]]),
            repeat(attention_mask, runs),
            repeat(position_ids, runs),
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            clean_rows=clean_rows,
        )
        hidden_states = outputs.last_hidden_state[: len(noisy)]
        if self.logits_shift and clean_rows:
            # The last token of a block predicts the first one of the next, as in decoding, from its block when clean.
            positions = text_positions(clean, attention_mask) if position_ids is None else position_ids
            ends_block = (positions % size == size - 1).expand(batch, -1).repeat(views, 1)
            from_clean = outputs.last_hidden_state[-batch:].repeat(views, 1, 1)
            hidden_states = torch.where(ends_block[..., None], from_clean, hidden_states)
        return hidden_states, outputs.hidden_states

    def _add_noise(self, clean, labelled, positions, samples):
        """The noisy text, its labels and its mask ratio (or `None`), of a clean text."""
        mask_token_id = self.config.mask_token_id
        if mask_token_id is None:
            raise ValueError(
                "The text is clean, and the model's configuration has no `mask_token_id` to noise it with."
            )
        if self.config.use_complementary_mask:
            return *mask_complementary(clean, labelled, mask_token_id, positions // self.config.block_size), None
        return mask_sequences(clean, labelled, mask_token_id, samples)

    def step_forward(self) -> StepForward | None:
        """See [`DenoisingModel.step_forward`]."""
        fused = FusedGLADream.of(self) if all(_is_as_built(layer) for layer in self.model.layers) else None
        return fused or (EagerStep(self) if can_be_captured(self) and ranks_of(self) is None else None)

    def _positions(self, attention_mask: torch.Tensor, length: int) -> None:
        """None: the stack counts them itself, and then need not look for packed samples."""

    def _kept(self, outputs: BaseModelOutputWithPast, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        hidden_states, cache = outputs[0], outputs.past_key_values
        if self.logits_shift and isinstance(cache, GLADreamCache) and getattr(logits_to_keep, "ndim", 0) == 2:
            # Index -1 is the token before the window.
            hidden_states, logits_to_keep = (
                cache.with_token_before(hidden_states, cache.last_window),
                logits_to_keep + 1,
            )
        return keep_positions(hidden_states, logits_to_keep)


def _is_as_built(layer) -> bool:
    """Whether a layer still consists of the modules that it was built of."""
    attention, decay = layer.self_attn, layer.self_attn.gk_proj[1]
    kinds = (type(layer), type(attention), type(layer.mlp), type(decay))
    if kinds != (GLADreamDecoderLayer, GLADreamAttention, Qwen2MLP, DecayProjection):
        return False
    convolutions = convolutions_of(attention)
    if any(
        type(each) is not ShortConvolution or each.weight.shape[2:] != convolutions[0].weight.shape[2:]
        for each in convolutions
    ):
        return False
    return not vars(attention).keys() & vars(GLADreamAttention).keys() and "forward" not in vars(decay)
