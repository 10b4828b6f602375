"""What all families share: the forward pass with head and loss, and bidirectional attention."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .evaluation.likelihood import log_likelihood
from .from_autoregressive import FromAutoregressive
from .fused.stack import FusedStack
from .generation.attention import mask_of_rule, uses_flash_attention
from .generation.contract import StepForward
from .generation.mixin import DiffusionGenerationMixin
from .training.losses import masked_diffusion_loss

logger = logging.get_logger(__name__)


class MaskedDiffusionLM(DiffusionGenerationMixin, FromAutoregressive, PreTrainedModel):
    """A masked-diffusion language model: `self.model`, the stack of layers, and `self.lm_head`.

    Goes before the family's `PreTrainedModel` in a class's bases. `base_model_class` is the class of the stack.
    """

    base_model_class: type[PreTrainedModel]
    model: PreTrainedModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: dict[str, str] = {"lm_head": "colwise_gather_output"}
    _pp_plan: dict[str, tuple] = {"lm_head": (["hidden_states"], ["logits"])}
    _has_seen_labels = False
    log_likelihood = log_likelihood

    def __init__(self, config: PreTrainedConfig, head_bias: bool = False):
        super().__init__(config)
        # The library derives it from the class's name; for `ForCausalLM` its `Trainer` leaves the first column's labels
        # out of `num_items_in_batch`.
        self.loss_type = None  # type: ignore[assignment]  # the library takes None
        self.model = self.base_model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mask_ratio: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # transformers inspects this annotation for `output_attentions`
    ) -> ModelOutput:
        """
        Args:
            input_ids: `(batch, length)`, or `inputs_embeds`: `(batch, length, hidden)`.
            attention_mask: `(batch, keys)`, 0 on padding, or `(batch, 1, length, keys)`.
            position_ids: `(batch, length)`; by default the tokens are counted, padding left out. With labels, several
                samples packed into a row each start from 0 and do not see each other.
            past_key_values: a cache to read and to write.
            labels: `(batch, length)`, the clean token at masked positions, -100 elsewhere.
            mask_ratio: `(batch,)` or `(batch, length)`, see [`training.losses.masked_diffusion_loss`].
            token_mask: `(batch, length)`, 0 on padding, where `attention_mask` has four dimensions.
            logits_to_keep: which positions reach the head: the last n (0: all), the positions in a 1-D tensor, or
                for each row those in a `(batch, kept)` tensor.

        Returns:
            A [`CausalLMOutputWithPast`] (of SDAR-MoE the `Moe` one), with the `logits` of the kept positions as the head
            gives them: they are not moved by `logits_shift`.
        """
        if attention_mask is not None and len(attention_mask.shape) == 2:
            token_mask = attention_mask
        inputs = {
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "token_mask": token_mask,
            **kwargs,
        }
        if labels is None:
            if mask_ratio is not None:
                raise ValueError(
                    "`mask_ratio` weighs the loss of `labels`, and there are none. `Trainer` takes them away for "
                    "`label_smoothing_factor` and `compute_loss_func`, which do not know this loss: leave both out."
                )
            return self._predict(input_ids, attention_mask, position_ids, **inputs)
        if torch.is_tensor(logits_to_keep) or logits_to_keep:
            raise ValueError("`labels` needs the logits of every position: leave `logits_to_keep` out.")
        return self._forward_with_loss(
            input_ids, attention_mask, position_ids, labels, mask_ratio, num_items_in_batch, **inputs
        )

    def _predict(
        self, input_ids, attention_mask, position_ids, *, logits_to_keep, token_mask=None, inputs_embeds=None, **inputs
    ) -> ModelOutput:
        """The forward pass without a loss."""
        if position_ids is None and attention_mask is not None and len(attention_mask.shape) == 2:
            given = input_ids if inputs_embeds is None else inputs_embeds
            position_ids = self._positions(attention_mask, given.shape[1])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,  # `config.return_dict` is about the output of `forward`
            **inputs,
        )
        return self._output(self.lm_head(self._kept(outputs, logits_to_keep)), outputs, token_mask)

    def predict_noisy(self, input_ids, attention_mask, labels, position_ids=None, **inputs) -> ModelOutput:
        """The forward pass over a noisy text of which the labels are known: packed samples do not see each other. The
        arguments are those of `forward`."""
        if position_ids is not None and (attention_mask is None or len(attention_mask.shape) == 2):
            attention_mask = packed_mask(self.config, labels, self.dtype, attention_mask, position_ids)
        return self._predict(input_ids, attention_mask, position_ids, **inputs)

    def _forward_with_loss(
        self, input_ids, attention_mask, position_ids, labels, mask_ratio, num_items_in_batch, *, token_mask, **inputs
    ) -> ModelOutput:
        output = self.predict_noisy(input_ids, attention_mask, labels, position_ids, token_mask=token_mask, **inputs)
        loss = masked_diffusion_loss(
            output["logits"], labels, self.logits_shift, mask_ratio, token_mask, num_items_in_batch, position_ids
        )
        self._warn_of_clean_text(input_ids, labels, mask_ratio)
        if output.get("aux_loss") is not None:
            loss = loss + self.config.router_aux_loss_coef * output["aux_loss"]
        return type(output)(loss=loss, **output)

    def step_forward(self) -> StepForward | None:
        """See [`DenoisingModel.step_forward`]."""
        return FusedStack.of(self)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As the library's. Each trainer of TRL calls it with its name in `__init__`. They compute the loss of the next token
        from the logits themselves, so that only trainers tagged `masked-diffusion` are let through."""
        names = [tags] if isinstance(tags, str) else tags
        if "trl" in names and "masked-diffusion" not in names:
            raise ValueError(
                f"TRL's trainer ({', '.join(names)}) takes the loss of the next token, which is not this model's: use "
                "`dllm_hf.training.MaskedDiffusionSFTTrainer` or `transformers.Trainer`. A trainer of your own that has "
                "another loss says so with `_tag_names = ['trl', ..., 'masked-diffusion']`."
            )
        super().add_model_tags(tags)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As PyTorch's, also for the names on disk: `Trainer` loads its checkpoints with it, not strictly, and would
        skip every weight whose name differs there."""
        if not state_dict.keys() <= self.state_dict().keys():
            loaded: Any = type(self).from_pretrained(
                None,
                config=deepcopy(self.config),
                state_dict=dict(state_dict),
                dtype=self.dtype,
                output_loading_info=True,
            )
            read, info = loaded
            unknown = {name: state_dict[name] for name in info["unexpected_keys"]}
            found = {name: value for name, value in read.state_dict().items() if name not in info["missing_keys"]}
            state_dict = {**found, **unknown}
        return super().load_state_dict(state_dict, strict, assign)

    def _warn_of_clean_text(self, input_ids, labels: torch.Tensor, mask_ratio) -> None:
        """Warn of labels at tokens that are not masked: a bidirectional model learns to copy them. Checked at the first
        loss only, since the check waits for the device. A `mask_ratio` is the ratio of noise that was drawn."""
        mask = self.config.mask_token_id
        if self._has_seen_labels or input_ids is None or mask is None or torch.compiler.is_compiling():
            return
        self._has_seen_labels = True
        if mask_ratio is None and is_clean(input_ids, labels != -100, mask):
            logger.warning_once(
                "There are `labels`, and no token of `input_ids` that they are for is masked: a model that sees the tokens "
                "which it is to predict learns to copy them. Collators for autoregressive models give such batches: take "
                "`dllm_hf.training.DataCollatorForMaskedDiffusion`, which draws the noise."
            )

    def _positions(self, attention_mask: torch.Tensor, length: int) -> torch.Tensor | None:
        """`(batch, length)`: the tokens counted, padding left out."""
        return counted_positions(attention_mask)[:, -length:]

    def _kept(self, outputs: BaseModelOutputWithPast, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        return keep_positions(outputs[0], logits_to_keep)

    def _output(self, logits, outputs: BaseModelOutputWithPast, token_mask) -> ModelOutput:
        return CausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def is_clean(input_ids: torch.Tensor, labelled: torch.Tensor, mask_token_id: int | None) -> bool:
    """Whether tokens are `labelled`, `(batch, length)` bool, and none of them is masked."""
    return bool(labelled.any()) and not bool((labelled & (input_ids == mask_token_id)).any())


def text_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`(batch or 1, length)`: the positions of tokens where the caller gives none."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return counted_positions(attention_mask)


def counted_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """`(batch, length)`: the tokens counted from 0, padding left out; the mask is 0 on padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def sample_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """`(batch, length)`: which of the samples packed into a row a token belongs to; each starts at position 0."""
    starts = position_ids == 0
    if not torch.compiler.is_compiling() and ((position_ids.diff(dim=-1) < 0) & ~starts[:, 1:]).any():
        raise ValueError(
            "`position_ids` go backwards inside a sample: they must rise from 0 in each of the samples of a row."
        )
    counts = starts.long().cumsum(-1)
    return counts - counts[:, :1]


def packed_mask(
    config: PreTrainedConfig,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
):
    """A mask for the attention in use: samples packed into a row of `tokens` do not see each other. It is `attention_mask`
    where no row holds more than one."""
    positions = position_ids.expand_as(tokens)
    if attention_mask is not None:
        # Padding is at position 0, too, but begins no sample: give it the position of the token before it.
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        positions = positions.gather(1, columns.masked_fill(attention_mask == 0, 0).cummax(-1).values)
    samples = sample_ids(positions)
    if not torch.compiler.is_compiling() and not samples.any():
        return attention_mask
    if uses_flash_attention(config):
        raise ValueError(
            "FlashAttention cannot keep packed samples apart: load the model with `attn_implementation='sdpa'` or, on "
            "a GPU, `'flex_attention'`, or give each sample a row."
        )

    def sees(batch_index, head_index, query_index, key_index):
        return samples[batch_index, key_index] == samples[batch_index, query_index]

    # Only shape, dtype and device of the embeddings are read.
    shaped_like = torch.empty(*tokens.shape, 1, dtype=dtype, device=tokens.device)
    return mask_of_rule(config, shaped_like, attention_mask, sees)


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """`(batch, length, hidden)` -> the positions that reach the head, see [`MaskedDiffusionLM.forward`]."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    # `take_along_dim` would fix the length in an exported program.
    batch, _, hidden = hidden_states.shape
    return hidden_states.gather(1, logits_to_keep[..., None].expand(batch, -1, hidden))


def attend_both_ways(model) -> None:
    """Turn a decoder of the library's into a bidirectional encoder, at the end of the stack's `__init__`.

    Masks follow `config.is_causal`; without a mask, SDPA and FlashAttention read the attribute of the layer. The
    embedding of the padding token is initialised and trained like any other: in these checkpoints it also ends the
    sequence.
    """
    for layer in model.layers:
        layer.self_attn.is_causal = False
    model.embed_tokens.padding_idx = None
    model.embed_tokens._is_hf_initialized = False  # initialise it again, without a row of zeros for padding
    model.post_init()
