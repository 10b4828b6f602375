"""Dream: a Qwen2 with bidirectional attention, its predictions shifted by one position."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel

from ..modeling import MaskedDiffusionLM, attend_both_ways
from .configuration_dream import DreamConfig


class DreamPreTrainedModel(Qwen2PreTrainedModel):
    config: DreamConfig


class DreamBaseModel(DreamPreTrainedModel, Qwen2Model):
    """The stack of layers without the head (the original's name for it; `DreamModel` has the head)."""

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        attend_both_ways(self)


class DreamModel(MaskedDiffusionLM, DreamPreTrainedModel):
    """Dream with its head (Ye et al., arXiv:2508.15487, https://github.com/DreamLM/Dream).

    Its training started from an autoregressive model: position i - 1 predicts position i.
    """

    base_model_class = DreamBaseModel
    logits_shift = 1
    cache_policies = ("none", "prefix", "dual")
    default_block_length = None
    default_remasking_strategy = "origin"
