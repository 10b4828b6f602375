"""Self-speculation: the tokens of autoregressive decoding, drafted by the diffusion head and verified by a causal pass."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TextDiffusionStreamer

from dllm_hf import LLM, DiffusionGenerationConfig, SamplingParams
from dllm_hf.engine.engine import Engine
from dllm_hf.engine.sampling_params import StructuredOutputsParams

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


def published(model, prompt: list[int], number: int, block: int) -> tuple[list[int], int]:
    """`linear_spec_generate` of the published checkpoints, at temperature 0 and without a cache: the new tokens and its
    forward passes."""

    def best(text: list[int], clean: int) -> list[int]:
        column = torch.arange(len(text))
        mask = (column <= column[:, None]) | (column[:, None] >= clean)
        logits = model(torch.tensor([text]), attention_mask=mask[None, None], position_ids=column[None]).logits[0]
        logits[:, model.config.mask_token_id] = -torch.inf
        return logits.argmax(-1).tolist()

    text, passes = [*prompt, best(prompt, len(prompt))[-1]], 1
    while len(text) < len(prompt) + number:
        clean, passes = len(text) - 1, passes + 2
        draft = best([*text, *[model.config.mask_token_id] * (block - 1)], clean)[clean + 1 :]
        verified = best([*text, *draft], clean + block)[clean:]
        right = [token == own for token, own in zip(draft, verified)]
        text += verified[: [*right, False].index(False) + 1]
    return text[len(prompt) : len(prompt) + number], passes


@torch.no_grad()
def test_it_takes_no_more_passes_than_the_published_loop():
    """On the weights of the golden cases, from several places, in blocks that divide the number of tokens and others. The
    tokens are those of `ar_generate`, which are those of blocks of one token, whatever the strategy."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN)
    for prompt, number, block in ((span(5, 15), 16, 8), (span(40, 43), 21, 4), ([7] * 9, 24, 16), (span(90, 95), 1, 8)):
        tokens, passes = published(model, prompt, number, block)
        output = generate(model, [prompt], max_new_tokens=number, block_length=block, **SPECULATES)
        assert output.sequences[0, len(prompt) :].tolist() == tokens
        assert output.num_forward_passes <= passes
        plain = generate(model, [prompt], max_new_tokens=number, block_length=1, eos_token_id=[])
        assert plain.sequences.tolist() == output.sequences.tolist() and plain.num_forward_passes == number


# --- passes


@pytest.mark.parametrize(
    "number, length, passes", [(1, 4, 1), (2, 4, 2), (13, 4, 7), (14, 4, 8), (9, 32, 3), (5, 1, 5)]
)
def test_a_draft_that_is_right_costs_two_passes(number, length, passes):
    """One for the first token, then two for each block; a single token that is left needs no draft."""
    output = generate(walking({5: 7, 7: 7}, 7), [[5]], max_new_tokens=number, block_length=length, **SPECULATES)
    assert output.sequences[0].tolist() == [5] + [7] * number
    assert output.num_forward_passes == passes
    assert output.tokens_per_forward.item() == pytest.approx(number / passes)


def test_of_a_draft_that_is_partly_right_the_beginning_is_kept_and_one_token_more():
    model = walking({8: 7, 7: 8}, 7)
    with recorded(model) as calls:
        output = generate(model, [[8]], max_new_tokens=8, block_length=4, output_history=True, **SPECULATES)
    assert output.sequences[0].tolist() == [8, 7] * 4 + [8]
    assert [fed for [fed] in columns_fed(calls)] == [
        [0],  # the prompt
        *[span(1, 5)] * 2,  # 8 where the draft says 7
        *[span(2, 6)] * 2,  # 7 as the draft says, then 8
        *[span(4, 8)] * 2,
        *[span(6, 8)] * 2,
    ]
    m = MASK
    assert [step[0, 1:].tolist() for step in output.history][:5] == [
        [7, m, m, m, m, m, m, m],
        [7, 7, 7, 7, m, m, m, m],
        [7, 8, m, m, m, m, m, m],
        [7, 8, 7, 7, 7, m, m, m],
        [7, 8, 7, 8, m, m, m, m],
    ]
    assert output.past_key_values.final_lengths == [8]


# --- where else


@pytest.mark.parametrize("policy", ["block", "none"])
def test_a_row_of_a_batch_draws_what_it_draws_alone(model, policy):
    rows = [[5, 6, 7, 8, 9], [12], [20, MASK, 22, MASK]]
    options = {"max_new_tokens": 7, "block_length": 4, "temperature": 0.9, "top_k": 3, "cache_policy": policy}
    assert_each_row_is_what_it_is_alone(model, rows, **options, **SPECULATES)


def test_a_temperature_draws_from_the_distribution_of_each_token_after_those_before_it():
    """8 follows on 7 with a probability of 3/4, and 7 on 8; a draft is 7 as often as not."""
    model = walking({7: 7, 8: 8}, 7)
    with torch.no_grad():
        scale = model.config.hidden_size**0.5  # of a token's normed embedding
        model.lm_head.weight.fill_(0)
        model.lm_head.weight[[token for token in range(64) if token not in (7, 8)], :3] = -100
        model.lm_head.weight[8, 0] = model.lm_head.weight[7, 1] = torch.log(torch.tensor(3.0)) / scale
    options = {"max_new_tokens": 6, "block_length": 4, "temperature": 1.0, "num_return_sequences": 600}
    texts = generate(model, [[7]], generator=torch.Generator().manual_seed(0), **options, **SPECULATES).sequences
    assert set(texts.flatten().tolist()) == {7, 8}
    changes = (texts[:, 1:] != texts[:, :-1]).float()
    assert (changes.mean(0) - 0.75).abs().max() < 0.06  # 3.4 standard deviations
    pairs = changes[:, 1:] * changes[:, :-1]
    assert (pairs.mean(0) - 0.75**2).abs().max() < 0.07


def test_graphs_speculate_too(captured):
    options = {"max_new_tokens": 13, "block_length": 4}
    model = fresh_model("nemotron_diffusion")
    found = both_ways(model, **options, **SPECULATES)
    assert captured
    assert (
        found.sequences.tolist()
        == both_ways(model, **{**options, "block_length": 1}, eos_token_id=[]).sequences.tolist()
    )


def test_a_conversation_goes_on(model):
    past, text = None, [5, 6, 7]
    for end in ([30, 31, 32], [33], []):
        options = {"max_new_tokens": 9, "eos_token_id": []}
        expected = generate(model, [text], block_length=1, **options).sequences
        output = generate(model, [text], past_key_values=past, self_speculation=True, **options)
        assert output.sequences.tolist() == expected.tolist()
        past = output.past_key_values
        assert past.final_lengths[0] >= len(text) + 9 - 4
        assert_cache_is_final(model, past)
        text = [*output.sequences[0].tolist(), *end]


def test_a_stop_string_ends_a_row_where_it_ends_it_in_autoregressive_decoding(model):
    tokenizer = character_tokenizer()
    options = {"max_new_tokens": 12, "tokenizer": tokenizer, "eos_token_id": []}
    free = new_tokens(model, [1, 2], max_new_tokens=12, **SPECULATES)
    options["stop_strings"] = tokenizer.decode(free[4:6])
    expected = generate(model, [[1, 2]], block_length=1, **options).sequences
    assert generate(model, [[1, 2]], self_speculation=True, **options).sequences.tolist() == expected.tolist()


def test_a_stream_shows_drafts_and_keeps_what_is_verified(model):
    class Written(TextDiffusionStreamer):
        drafts, text = 0, ""

        def put_draft(self, value, **kwargs):
            self.drafts += 1

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    tokenizer = character_tokenizer()
    streamer = Written(tokenizer)
    output = generate(model, [[1, 2, 3]], max_new_tokens=12, streamer=streamer, **SPECULATES)
    assert streamer.text == tokenizer.decode(output.sequences[0])
    assert streamer.drafts == output.num_forward_passes


def test_requests_of_an_engine_speculate_beside_others(model):
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 11], [12]]
    llm = LLM(model, max_num_seqs=3, draft_steps=2)
    params = [
        SamplingParams(max_tokens=11, options={"self_speculation": True}),
        SamplingParams(max_tokens=9, remasking_strategy="low_confidence_static"),
        SamplingParams(max_tokens=7, block_length=8, options={"self_speculation": True}),
    ]
    outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    for prompt, own, tokens in zip(prompts, params, outputs):
        options = own.options or {"remasking_strategy": "low_confidence_static"}
        expected = new_tokens(model, prompt, max_new_tokens=own.max_tokens, block_length=own.block_length, **options)
        assert tokens == (expected[: expected.index(END) + 1] if END in expected else expected)


def test_an_aborted_request_tells_nothing_of_a_draft():
    model = walking({8: 7, 7: 8}, 7)  # drafts are 7 7 7, the text is 7 8 7 8
    engine = Engine(model, None, 1, 40, {"cache_policy": "block"}, 10, 16, 120)
    for steps in range(1, 6):
        options = {"self_speculation": True}
        engine.submit(engine.intake.prepare([8], SamplingParams(max_tokens=9, options=options), "a"))
        for _ in range(steps):
            engine.step()
        engine.abort("a")
        found = []
        while not engine.is_idle:
            found += [event.output.token_ids for event in engine.step() if event.output is not None]
        assert [tokens == ([7, 8] * 5)[: len(tokens)] for tokens in found] == [True]


# --- refusals


def test_other_families_refuse_it_and_name_those_that_can():
    for family in ("llada", "sdar", "fast_dllm_v2"):
        refused(tiny_model(family), "`self_speculation=True`.*NemotronLabsDiffusionModel", self_speculation=True)


@pytest.mark.parametrize(
    "options, mention",
    [
        ({"confidence_threshold": 0.9}, "remasking_strategy|confidence_threshold"),
        ({"denoising_steps": 2}, "denoising_steps"),
        ({"draft_steps": 2}, "draft_steps"),
        ({"repetition_penalty": 1.2}, "repetition_penalty.*`block_length=1`"),
        ({"generation_tokens_hook_func": lambda step, text, logits: text}, "hooks"),
        ({"self_speculation": "linear"}, "True or False"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_have_no_part_in_it_is_refused(model, options, mention):
    refused(model, mention, "self_speculation", **{"self_speculation": True, **options})


def test_a_strategy_of_a_call_is_not_ignored_where_the_generation_config_speculates():
    config = DiffusionGenerationConfig(self_speculation=True, remasking_strategy="low_confidence_dynamic")
    with pytest.raises(ValueError, match="`steps`.*give `self_speculation=False`"):
        config.updated(steps=3)
    assert config.updated(steps=3, self_speculation=False).steps == 3


def test_a_form_is_decoded_without_it():
    with pytest.raises(ValueError, match="`self_speculation` cannot go with `structured_outputs`"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"), options={"self_speculation": True})
