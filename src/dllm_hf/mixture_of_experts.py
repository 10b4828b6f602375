"""What families on the library's experts share."""

from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from .modeling import MaskedDiffusionLM


class InheritedExperts:
    """Goes before the library's `PreTrainedModel` in a class's bases."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The library searches the file of the class for a decorator, which is in the file of the inherited experts.
        return True


class BalancedExpertsLM(MaskedDiffusionLM):
    """A model whose router is trained with a load-balancing loss (Qwen3-MoE's). Goes first in a class's bases."""

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
