"""SDAR-MoE: SDAR's attention with Qwen3-MoE's router and experts."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    load_balancing_loss_func,
)

from ..block_diffusion import BlockCausalModel, BlockDiffusionLM
from ..modeling import attend_both_ways
from .configuration_sdar_moe import SDARMoeConfig

# On disk each expert has its own weights; the library's grouped forward needs them stacked.
register_checkpoint_conversion_mapping("sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)


class SDARMoePreTrainedModel(Qwen3MoePreTrainedModel):
    config: SDARMoeConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library searches the file of the class for a decorator, which is in the file of the inherited experts.
        return True


class SDARMoeModel(BlockCausalModel, SDARMoePreTrainedModel, Qwen3MoeModel):
    """The stack of layers without the head."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__(config)
        attend_both_ways(self)


class SDARMoeForCausalLM(BlockDiffusionLM, SDARMoePreTrainedModel):
    """SDAR-MoE with its head (Cheng et al., arXiv:2510.06303, https://github.com/JetAstra/SDAR)."""

    base_model_class = SDARMoeModel

    def _output(self, logits, outputs, token_mask) -> MoeCausalLMOutputWithPast:
        """With the load-balancing loss of the router where `output_router_logits` asks for it."""
        aux_loss = None
        if outputs.router_logits is not None:
            config = self.config
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, token_mask
            )
        return MoeCausalLMOutputWithPast(
            aux_loss=aux_loss,  # type: ignore[arg-type]  # an integer only without router logits
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
