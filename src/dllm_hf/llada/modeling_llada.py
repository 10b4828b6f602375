"""LLaDA: a Llama with bidirectional attention."""

from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

from ..modeling import MaskedDiffusionLM, attend_both_ways
from .configuration_llada import LLaDAConfig

# On disk the weights keep the names of the original checkpoints: renamed on loading, and back on saving. The stack alone
# has them without `model.`. Adapters are saved under our names, which the patterns must not match.
_NAMES = {
    "model.transformer.ff_out.": "lm_head.",
    r"(^|model\.)transformer\.wte\.": r"\1embed_tokens.",
    r"(^|model\.)transformer\.ln_f\.": r"\1norm.",
    r"(^|model\.)transformer\.blocks\.": r"\1layers.",
    ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.",
    r"(?<!\.self_attn)\.q_proj\.": ".self_attn.q_proj.",
    r"(?<!\.self_attn)\.k_proj\.": ".self_attn.k_proj.",
    r"(?<!\.self_attn)\.v_proj\.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_proj.": ".mlp.gate_proj.",
    r"(?<!\.mlp)\.up_proj\.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
}
register_checkpoint_conversion_mapping(
    "llada", [WeightRenaming(original, ours) for original, ours in _NAMES.items()], overwrite=True
)


class LLaDAPreTrainedModel(LlamaPreTrainedModel):
    config_class = LLaDAConfig


class LLaDAModel(LLaDAPreTrainedModel, LlamaModel):
    """The stack of layers without the head."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)  # type: ignore[arg-type]  # it reads fields that ours has under other names
        if config.include_qkv_bias and not config.include_bias:
            for layer in self.layers:
                layer.set_submodule("self_attn.o_proj", nn.Linear(config.hidden_size, config.hidden_size, bias=False))
        attend_both_ways(self)


class LLaDAModelLM(MaskedDiffusionLM, LLaDAPreTrainedModel):
    """LLaDA with its head (Nie et al., arXiv:2502.09992, https://github.com/ML-GSAI/LLaDA)."""

    base_model_class = LLaDAModel
    cache_policies = ("none", "prefix", "dual")
    default_block_length = 32
    confidence_source = "raw"

    def __init__(self, config: LLaDAConfig):
        if config.model_type == LLaDAConfig.model_type and not hasattr(config, "include_bias"):
            raise ValueError("This is a LLaDA-MoE, with the `model_type` of LLaDA: load it with `LLaDAMoEModelLM`.")
        super().__init__(config, head_bias=config.include_bias)
