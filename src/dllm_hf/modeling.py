"""What every family that runs on attention shares: the head, the loss, and attention without a direction."""

from copy import deepcopy

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .fused.stack import FusedStack
from .generation.attention import uses_flash_attention
from .training.losses import masked_diffusion_loss

logger = logging.get_logger(__name__)


class MaskedDiffusionLM:
    """Forward pass of a masked-diffusion language model around `self.model` and `self.lm_head`.

    A class's bases are this, `DiffusionGenerationMixin` (`can_generate()` of the library looks for that name among the
    direct bases) and the family's `PreTrainedModel`, in this order.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _has_seen_labels = False

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_ratio: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # the library reads here that `output_attentions` is understood
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            input_ids: `(batch, length)`, or `inputs_embeds`: `(batch, length, hidden)`.
            attention_mask: `(batch, keys)`, 0 on padding, or `(batch, 1, length, keys)`.
            position_ids: `(batch, length)`; by default the tokens are counted, padding left out. With labels, several
                samples packed into a row each start from 0 and do not see each other.
            past_key_values: a cache to read and to write.
            labels: `(batch, length)`, the clean token at masked positions, -100 elsewhere.
            mask_ratio: `(batch,)` or `(batch, length)`, see [`training.losses.masked_diffusion_loss`].
            token_mask: `(batch, length)`, 0 on padding, where `attention_mask` is a made one and does not say it.
            logits_to_keep: which positions reach the head: the last n (0: all), the positions in a 1-D tensor, or
                for each row those in a `(batch, kept)` tensor.

        Returns:
            `logits` of the kept positions, as the head gives them: `logits_shift` is left to the reader.
        """
        if mask_ratio is not None and labels is None:
            raise ValueError(
                "`mask_ratio` weighs the loss of `labels`, and there are none. `Trainer` takes them away for "
                "`label_smoothing_factor` and `compute_loss_func`, which do not know this loss: leave both out."
            )
        is_made = attention_mask is not None and len(attention_mask.shape) == 4
        packed = attention_mask
        if labels is not None and position_ids is not None and not is_made:
            packed = packed_mask(self.config, labels, self.dtype, attention_mask, position_ids)
        samples = position_ids
        if attention_mask is not None and len(attention_mask.shape) == 2:
            token_mask = attention_mask
            if position_ids is None:
                length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
                position_ids = self._positions(attention_mask, length)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=packed,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,  # whatever the configuration says, which is about the output of this method
            **kwargs,
        )
        logits = self.lm_head(self._kept(outputs, logits_to_keep))
        loss = None
        if labels is not None:
            self._expect_noise(input_ids, labels, mask_ratio)
            loss = masked_diffusion_loss(
                logits, labels, self.logits_shift, mask_ratio, token_mask, num_items_in_batch, samples
            )
        output = self._output(loss, logits, outputs, token_mask)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def step_forward(self) -> FusedStack | None:
        """See [`DiffusionGenerationMixin.step_forward`]."""
        return FusedStack.of(self)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As the library's. Every trainer of TRL calls it when it is made, with its name; all of them go past `forward` to the
        probabilities of the next token, so that only those are let through which say that they do not."""
        names = [tags] if isinstance(tags, str) else tags
        if "trl" in names and "masked-diffusion" not in names:
            raise ValueError(
                f"TRL's trainer ({', '.join(names)}) takes the loss of the next token, which is not this model's: use "
                "`dllm_hf.training.MaskedDiffusionSFTTrainer` or `transformers.Trainer`. A trainer of your own that has "
                "another loss says so with `_tag_names = ['trl', ..., 'masked-diffusion']`."
            )
        super().add_model_tags(tags)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As PyTorch's, for the names on disk as well: `Trainer` reads its checkpoints with it, and would pass over
        every weight that has another name there.
        """
        if not state_dict.keys() <= self.state_dict().keys():
            read, info = type(self).from_pretrained(
                None,
                config=deepcopy(self.config),
                state_dict=dict(state_dict),
                dtype=self.dtype,
                output_loading_info=True,
            )
            unknown = {name: state_dict[name] for name in info["unexpected_keys"]}
            found = {name: value for name, value in read.state_dict().items() if name not in info["missing_keys"]}
            state_dict = {**found, **unknown}
        return super().load_state_dict(state_dict, strict, assign)

    def _expect_noise(self, input_ids, labels: torch.Tensor, mask_ratio) -> None:
        """Warn of labels without a mask, which teach a model that sees both ways to copy what it sees. Only at the first
        loss, since it looks at the device; `mask_ratio` comes from noise that was drawn."""
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
        """The tokens counted, padding left out: `(batch, length)`."""
        return counted_positions(attention_mask)[:, -length:]

    def _kept(self, outputs: BaseModelOutputWithPast, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        return keep_positions(outputs.last_hidden_state, logits_to_keep)

    def _output(self, loss, logits, outputs: BaseModelOutputWithPast, token_mask) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def is_clean(input_ids: torch.Tensor, labelled: torch.Tensor, mask_token_id: int | None) -> bool:
    """Whether tokens are `labelled`, `(batch, length)` bool, and none of them is masked."""
    return bool(labelled.any()) and not bool((labelled & (input_ids == mask_token_id)).any())


def check_labels(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, labels: torch.Tensor) -> None:
    """Raises a `ValueError` where a loss that reads the clean text cannot make it."""
    if input_ids is None or inputs_embeds is not None or labels.shape != input_ids.shape:
        raise ValueError("`labels` needs `input_ids` of the same shape: the clean text is made of both.")


def text_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`(batch or 1, length)`: the positions of tokens where the caller gives none."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return counted_positions(attention_mask)


def counted_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """The positions of tokens under a `(batch, length)` mask: counted, padding left out."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def sample_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """`(batch, length)`: which of the samples packed into a row a token belongs to; each starts at position 0."""
    starts = position_ids == 0
    if not torch.compiler.is_compiling() and ((position_ids.diff(dim=-1) < 0) & ~starts[:, 1:]).any():
        raise ValueError(
            "`position_ids` go backwards inside a sample: they must rise from 0 in each of the samples of a row."
        )
    begun = starts.long().cumsum(-1)
    return begun - begun[:, :1]


def packed_mask(
    config: PreTrainedConfig,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
) -> torch.Tensor | None:
    """The mask of the back end in use under which samples packed into a row of `tokens` do not see each other.

    Returns:
        `attention_mask` where no row holds more than one.
    """
    positions = position_ids.expand_as(tokens)
    if attention_mask is not None:
        # Padding stands at position 0 too, and begins no sample: it takes the position of the token before it.
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
    return create_bidirectional_mask(config, shaped_like, attention_mask, and_mask_function=sees)


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """`(batch, length, hidden)` -> the positions that reach the head, see [`MaskedDiffusionLM.forward`]."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    # `take_along_dim` would fix the length in an exported program.
    batch, _, hidden = hidden_states.shape
    return hidden_states.gather(1, logits_to_keep[..., None].expand(batch, -1, hidden))


def attend_both_ways(model: PreTrainedModel) -> None:
    """Turn a decoder of the library's into a bidirectional encoder. The last thing that `__init__` of a stack does.

    Its masks follow `config.is_causal`; where no mask is needed at all, SDPA and FlashAttention ask the layer. The
    embedding of the padding token starts and is trained like any other: in these checkpoints it also ends the sequence.
    """
    for layer in model.layers:
        layer.self_attn.is_causal = False
    if isinstance(model.embed_tokens, nn.Embedding):
        model.embed_tokens.padding_idx = None
        model.embed_tokens._is_hf_initialized = False  # it was, with a row of zeros for padding
    model.post_init()
