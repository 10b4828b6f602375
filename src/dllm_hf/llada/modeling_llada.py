"""LLaDA: a Llama whose attention has no direction."""

from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

from ..modeling import MaskedDiffusionLM, attend_both_ways
from .configuration_llada import LLaDAConfig

# On disk the weights keep the names of the original checkpoints: renamed on loading, and back on saving.
register_checkpoint_conversion_mapping(
    "llada",
    [
        WeightRenaming(r"model.transformer.wte.", r"model.embed_tokens."),
        WeightRenaming(r"model.transformer.ln_f.", r"model.norm."),
        WeightRenaming(r"model.transformer.ff_out.", r"lm_head."),
        WeightRenaming(r"model.transformer.blocks.", r"model.layers."),
        WeightRenaming(r".attn_norm.", r".input_layernorm."),
        WeightRenaming(r".ff_norm.", r".post_attention_layernorm."),
        WeightRenaming(r".attn_out.", r".self_attn.o_proj."),
        WeightRenaming(r".ff_proj.", r".mlp.gate_proj."),
        WeightRenaming(r".ff_out.", r".mlp.down_proj."),
    ],
    overwrite=True,
)


class LLaDAPreTrainedModel(LlamaPreTrainedModel):
    config: LLaDAConfig
    config_class = LLaDAConfig


class LLaDAModel(LLaDAPreTrainedModel, LlamaModel):
    """The stack of layers without the head."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        if config.include_qkv_bias and not config.include_bias:
            for layer in self.layers:
                layer.self_attn.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        attend_both_ways(self)
        self.post_init()


class LLaDAModelLM(MaskedDiffusionLM, LLaDAPreTrainedModel):
    """LLaDA with its head (Nie et al., arXiv:2502.09992, https://github.com/ML-GSAI/LLaDA)."""

    cache_policies = ("none", "prefix", "dual")
    default_block_length = 32
    confidence_source = "raw"

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.include_bias)
        self.post_init()
