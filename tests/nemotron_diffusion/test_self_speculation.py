"""Self-speculation: the tokens of autoregressive decoding, drafted by the diffusion head and verified by a causal pass."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TextDiffusionStreamer

from dllm_hf import LLM, SamplingParams

from ..builders import (
    END,
    MASK,
    assert_each_row_is_what_it_is_alone,
    character_tokenizer,
    generate,
    new_model,
    new_tokens,
    recorded,
    refused,
    tiny_model,
)
from ..contracts.calls import FEW_ENDS, MANY_ENDS, assert_cache_is_final, columns_fed, prompts, span
from ..generation.recorded_graphs import both_ways, fresh_model

SPECULATES = {"self_speculation": True, "eos_token_id": []}
GOLDEN = Path(__file__).parents[1] / "golden" / "nemotron_labs_diffusion-gqa"


@pytest.fixture
def model():
    return tiny_model("nemotron_diffusion")


def walking(following: dict[int, int], draft: int):
    """A model in which a token alone decides the next one, and every draft is the same token."""
    model, tokens = new_model("nemotron_diffusion"), [*following, MASK]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for index, token in enumerate(tokens):
            model.model.embed_tokens.weight[token, index] = 1
            model.lm_head.weight[following.get(token, draft), index] += 1
    return model


# --- tokens


@settings(max_examples=40)
@given(
    rows=st.lists(prompts, min_size=1, max_size=3),
    length=st.sampled_from([1, 2, 4, 8, 32]),
    options=st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(1, 14),
            "cache_policy": st.sampled_from(["block", "block", "none"]),
            "eos_token_id": st.sampled_from([[], FEW_ENDS, MANY_ENDS]),
            "suppress_tokens": st.sampled_from([None, [7]]),
            "cfg_scale": st.sampled_from([0.0, 0.0, 0.5]),
            "prefill_chunk_size": st.sampled_from([1, 3, 2048]),
            "logprobs": st.just(2),
        }
    ),
)
def test_the_tokens_are_those_of_autoregressive_decoding(model, rows, length, options):
    """With ends of sequence, given tokens between masks, and in batches; with what the model says of each token."""
    expected = generate(model, rows, block_length=1, **options)
    found = generate(model, rows, block_length=length, self_speculation=True, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)
