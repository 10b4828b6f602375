"""Blocks of one token are a causal model that reads its own mask: the library's, with the same weights."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ..builders import END, MASK, new_model, new_tokens, sdar_config, sdar_moe_config


def causal_twin(model):
    """The library's own causal model with the same weights, which knows nothing of blocks."""
    moe = model.config.model_type == "sdar_moe"
    make, config_class = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if moe else (Qwen3ForCausalLM, Qwen3Config)
    sizes = (sdar_moe_config if moe else sdar_config)().to_dict()
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    names += ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob") if moe else ()
    twin = make(config_class(**{name: sizes[name] for name in names})).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def one_mask_at_a_time(twin, prompt: list[int], number: int) -> list[int]:
    row = list(prompt)
    for _ in range(number):
        logits = twin(input_ids=torch.tensor([[*row, MASK]]), use_cache=False).logits[0, -1]
        logits[MASK] = -torch.inf
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("cache_policy", ["block", "none"])
@pytest.mark.parametrize("prompt", [[5, 17, 33, 2], [], [END, 8], list(range(25))], ids=len)
def test_blocks_of_one_token_are_the_library_s_causal_model_reading_one_mask_at_a_time(family, cache_policy, prompt):
    model = new_model(family)
    expected = one_mask_at_a_time(causal_twin(model), prompt, 14)
    options = {"max_new_tokens": 14, "block_length": 1, "cache_policy": cache_policy, "eos_token_id": []}
    assert new_tokens(model, prompt, **options) == expected
