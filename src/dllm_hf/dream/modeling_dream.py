"""Dream: a Qwen2 whose attention has no direction, its predictions shifted by one position."""

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel

from ..generation.mixin import DiffusionGenerationMixin
from ..modeling import MaskedDiffusionLM, attend_both_ways
from .configuration_dream import DreamConfig


class DreamPreTrainedModel(Qwen2PreTrainedModel):
    config: DreamConfig
    config_class = DreamConfig


class DreamBaseModel(DreamPreTrainedModel, Qwen2Model):
    """The stack of layers without the head (the original's name for it; `DreamModel` has the head)."""

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        attend_both_ways(self)


class DreamModel(MaskedDiffusionLM, DiffusionGenerationMixin, DreamPreTrainedModel):
    """Dream with its head (Ye et al., arXiv:2508.15487, https://github.com/DreamLM/Dream).

    It was started from an autoregressive model and kept its habit: position i - 1 predicts position i.
    """

    logits_shift = 1
    cache_policies = ("none", "prefix", "dual")
    default_block_length = None
    default_remasking_strategy = "origin"

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
