"""The cache policy `block` gives what `none` gives, token for token, and computes nothing twice."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dllm_hf import STRATEGIES

from ..builders import (
    END,
    MASK,
    VOCAB,
    assert_each_row_is_what_it_is_alone,
    generate,
    generators,
    left_pad,
    new_model,
    new_tokens,
    recorded,
    sdar_config,
    sdar_moe_config,
    tiny_model,
)
from .conftest import SDAR_FAMILIES

BLOCK_LENGTHS = (1, 2, 3, 4, 8, 16)
STATIC = {"remasking_strategy": "low_confidence_static"}
# Bounds that models as unsure as the tiny ones reach now and then.
BOUNDS = {
    "low_confidence_dynamic": {"confidence_threshold": 0.3},
    "entropy_bounded": {"entropy_bound": 4.0},
    "factor": {"factor": 2.0},
}
FEW_ENDS = [END, *range(3)]  # a row ends now and then while its neighbours go on
MANY_ENDS = [END, *range(10)]

tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, tokens, tokens, st.just(MASK)), max_size=14)
paces = st.one_of(
    st.just({}),
    st.builds(lambda number: {"steps": number}, st.integers(1, 20)),
    st.builds(lambda number: {"denoising_steps": number}, st.integers(1, 7)),
)
randomness = st.fixed_dictionaries(
    {"temperature": st.just(0.8), "top_k": st.sampled_from([None, 5]), "alg_temp": st.sampled_from([None, 0.3])}
)


@st.composite
def calls(draw, fewest_rows=1):
    """Prompts of a batch, and options. Masks in a prompt are positions to fill."""
    rows = draw(st.lists(prompts, min_size=fewest_rows, max_size=3))
    options = {
        "max_new_tokens": draw(st.integers(0, 13)),
        "block_length": draw(st.sampled_from(BLOCK_LENGTHS)),
        "prefill_chunk_size": draw(st.sampled_from([1, 2, 3, 5, 8, 2048])),
        "cfg_scale": draw(st.sampled_from([0.0, 0.0, 0.7])),
        "eos_token_id": draw(st.sampled_from([END, FEW_ENDS, MANY_ENDS])),
        **draw(paces),
        **draw(st.just({}) | randomness),
    }
    assume(options["max_new_tokens"] or all(rows))
    return rows, options


def both(model, rows, **options):
    """The outputs of the two policies, with the same random numbers for each row."""
    seeds = range(len(rows) * options.get("num_return_sequences", 1))
    return [
        generate(model, rows, generator=generators(seeds), cache_policy=policy, **options)
        for policy in ("block", "none")
    ]


def assert_equal(model, rows, **options):
    block, none = both(model, rows, **options)
    assert block.sequences.tolist() == none.sequences.tolist()
    assert block.tokens_per_forward.tolist() == none.tokens_per_forward.tolist()
    return block


def columns_fed(calls) -> list[list[list[int]]]:
    """For each forward pass and row, the columns in the window, those that only repeat left out."""
    return [[list(dict.fromkeys(row)) for row in call["position_ids"].tolist()] for call in calls]


def span(start: int, end: int) -> list[int]:
    return list(range(start, end))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", SDAR_FAMILIES)
@settings(max_examples=5)
@given(call=calls())
def test_the_cache_changes_no_token(family, strategy, call):
    rows, options = call
    assert_equal(tiny_model(family), rows, remasking_strategy=strategy, **BOUNDS.get(strategy, {}), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=5)
@given(
    family=st.sampled_from(SDAR_FAMILIES),
    cache_policy=st.sampled_from(["block", "block", "none"]),
    call=calls(fewest_rows=2),
)
def test_a_batch_gives_each_row_what_it_gets_alone(strategy, family, cache_policy, call):
    rows, options = call
    options = {"remasking_strategy": strategy, "cache_policy": cache_policy, **options, **BOUNDS.get(strategy, {})}
    assert_each_row_is_what_it_is_alone(tiny_model(family), rows, **options)


@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_prompts_of_every_remainder_give_the_same_in_both_policies(model, block_length):
    for remainder in range(block_length):
        prompt = span(1, 1 + block_length + remainder)
        assert_equal(model, [prompt], max_new_tokens=11, block_length=block_length, denoising_steps=2, **STATIC)


def test_a_ragged_batch_with_an_empty_prompt_gives_the_same_in_both_policies(model):
    rows = [span(1, 18), [], [5], span(30, 39), [END, END]]
    assert_equal(model, rows, max_new_tokens=13, block_length=4, denoising_steps=3, **STATIC)


def test_rows_that_end_early_give_the_same_in_both_policies(model):
    """Every row's own first new token ends it, one row after the other, while one row goes on to the end."""
    rows = [[5, 17, 33], [8, 9, 10, 11, 12, 13], [], [40], span(1, 12)]
    options = {"max_new_tokens": 40, "block_length": 4, **STATIC}
    free = generate(model, rows, eos_token_id=[], cache_policy="none", **options).sequences[:, 11:]
    ends = [int(free[0, 2]), int(free[1, 14]), int(free[2, 23])]
    output = assert_equal(model, rows, eos_token_id=ends, **options)
    lengths = [int((~torch.isin(row, torch.tensor(ends))).cumprod(0).sum()) for row in free]
    assert len(set(lengths)) > 2
    for row, whole, length in zip(output.sequences[:, 11:].tolist(), free.tolist(), lengths, strict=True):
        assert row[: length + 1] == whole[: length + 1]
        assert set(row[length + 1 :]) <= {END}


@pytest.mark.parametrize("waits", ["has ended", "has no block left"])
def test_a_long_row_that_waits_does_not_widen_what_a_short_one_sees(model, waits):
    """More of the waiting row is written than the other row has columns."""
    short, long = [1, 2, 3], span(4, 44)
    options = {"max_new_tokens": 20, "block_length": 4, **STATIC}
    if waits == "has ended":
        [first] = new_tokens(model, long, **{**options, "max_new_tokens": 1})
        options["eos_token_id"] = [first]
    else:
        short, long, options["max_new_tokens"] = [MASK] * 22, [*long, MASK], 0
    assert_equal(model, [short, long], **options)


@pytest.mark.parametrize("chunk", [1, 6, 2048])
def test_masks_anywhere_in_the_prompt_are_filled_alike_in_both_policies(model, chunk):
    """Given blocks between the masked ones, rows of different numbers of blocks, nothing after the prompt."""
    far = [MASK, *span(1, 16), MASK, MASK, *span(20, 33), MASK]
    rows = [far, [1, 2, 3], [MASK], [*span(1, 6), MASK]]
    options = {"block_length": 4, "denoising_steps": 2, "prefill_chunk_size": chunk, **STATIC}
    output = assert_equal(model, rows, max_new_tokens=0, **options)
    assert MASK not in output.sequences
    assert_equal(model, rows, max_new_tokens=6, **options)
    assert_equal(model, rows, max_new_tokens=6, cfg_scale=0.9, **options)


@pytest.mark.parametrize("block_length, chunk", [(8, 3), (4, 6), (3, 7), (1, 1)])
def test_a_prompt_computed_in_pieces_gives_the_same(model, block_length, chunk):
    """Pieces shorter than a block, and no multiple of it: they are rounded to whole blocks."""
    rows = [[int(t) for t in torch.arange(45) * 7 % 60], span(3, 20), [1]]
    options = {"max_new_tokens": 9, "block_length": block_length, **STATIC}
    in_pieces = assert_equal(model, rows, prefill_chunk_size=chunk, **options)
    whole = generate(model, rows, **options)
    assert in_pieces.sequences.tolist() == whole.sequences.tolist()
    with recorded(model) as calls:
        generate(model, rows, prefill_chunk_size=chunk, **options)
    piece = max(chunk // block_length, 1) * block_length
    assert max(call["input_ids"].shape[1] for call in calls) <= piece + block_length


def test_pieces_are_computed_without_the_head(model):
    with recorded(model.lm_head) as seen:
        generate(model, [span(1, 22)], max_new_tokens=3, prefill_chunk_size=8, block_length=4, **STATIC)
    assert [hidden_states.shape[1] for hidden_states in seen] == [0, 0, 4, 4, 4]


def test_each_of_the_returned_sequences_is_the_same_in_both_policies(model):
    options = {"max_new_tokens": 9, "temperature": 1.0, "num_return_sequences": 3}
    output = assert_equal(model, [[1, 2, 3], [4, 5, 6, 7, 8]], **options)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6


def test_the_history_is_the_same_in_both_policies(model):
    options = {"max_new_tokens": 9, "denoising_steps": 2, "output_history": True, **STATIC}
    block, none = both(model, [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]], **options)
    assert torch.equal(torch.stack(block.history), torch.stack(none.history))
    assert block.num_forward_passes == none.num_forward_passes == len(block.history)


def test_a_hook_that_puts_masks_back_into_the_block_changes_nothing_between_the_policies(model):
    """It doubts what it sees a few times, and the tokens it removes are decoded again."""
    outputs = []
    for policy in ("block", "none"):
        doubts = []

        def doubt(step, sequences, logits, doubts=doubts):
            if logits is not None and len(doubts) < 6:
                last = int((sequences[0] != MASK).nonzero().max())
                sequences = sequences.clone()
                sequences[0, max(last, 3)] = MASK
                doubts.append(step)
            return sequences

        options = {"max_new_tokens": 10, "generation_tokens_hook_func": doubt, **STATIC}
        outputs.append(generate(model, [[1, 2, 3]], cache_policy=policy, **options).sequences.tolist())
        assert len(doubts) == 6
    assert outputs[0] == outputs[1]


def test_a_hook_that_puts_masks_back_into_a_finished_block_changes_nothing_between_the_policies(model):
    outputs = []
    for policy in ("block", "none"):
        seen = []

        def doubt(step, sequences, logits, seen=seen):
            seen.append(step)
            if len(seen) == 6:  # in the third block
                sequences = sequences.clone()
                sequences[0, 1:7] = MASK
            return sequences

        options = {"max_new_tokens": 25, "generation_tokens_hook_func": doubt, "denoising_steps": 2, **STATIC}
        outputs.append(generate(model, [[1, 2, 3]], cache_policy=policy, **options).sequences.tolist())
    assert outputs[0] == outputs[1]
    assert MASK not in outputs[0][0]


def test_a_hook_that_rewrites_a_finished_block_changes_nothing_between_the_policies(model):
    outputs = []
    for policy in ("block", "none"):
        seen = []

        def rewrite(step, sequences, logits, seen=seen):
            seen.append(step)
            if len(seen) == 6:
                sequences = sequences.clone()
                sequences[0, :3] = 50
            return sequences

        options = {"max_new_tokens": 25, "generation_tokens_hook_func": rewrite, "denoising_steps": 2, **STATIC}
        outputs.append(generate(model, [[1, 2, 3]], cache_policy=policy, **options).sequences.tolist())
    assert outputs[0] == outputs[1]


def test_a_hook_that_fills_a_whole_block_changes_nothing_between_the_policies(model):
    """The block then makes no forward pass; the one before it has to be written by that of the block after it."""
    outputs = []
    for policy in ("block", "none"):

        def fill(step, sequences, logits):
            if step == 2:
                sequences = sequences.clone()
                sequences[0, 8:12] = torch.tensor([40, 41, 42, 43])
            return sequences

        options = {"max_new_tokens": 25, "generation_tokens_hook_func": fill, "denoising_steps": 2, **STATIC}
        output = generate(model, [[1, 2, 3, 4]], cache_policy=policy, **options)
        outputs.append(output.sequences.tolist())
    assert outputs[0] == outputs[1]
    assert outputs[0][0][8:12] == [40, 41, 42, 43]


def test_a_logits_hook_sees_the_same_logits_in_both_policies(model):
    seen = {"block": [], "none": []}
    for policy, kept in seen.items():
        generate(
            model,
            [span(1, 8), [1, 2]],
            max_new_tokens=8,
            cache_policy=policy,
            generation_logits_hook_func=lambda step, sequences, logits, kept=kept: kept.append(logits) or logits,
            **STATIC,
        )
    assert len(seen["block"]) == len(seen["none"])
    for block, none in zip(*seen.values(), strict=True):
        torch.testing.assert_close(block, none, atol=1e-4, rtol=1e-4)


# --- what a forward pass feeds, and how many there are


def test_a_step_feeds_the_block_and_its_first_also_what_is_final_but_not_written(model):
    options = {"max_new_tokens": 9, "block_length": 4, "denoising_steps": 2, **STATIC}
    with recorded(model) as calls:
        output = generate(model, [span(1, 7)], **options)
    assert [fed for [fed] in columns_fed(calls)] == [
        span(0, 8),  # the prompt's whole block, and the first block with the prompt's remainder
        span(4, 8),
        span(4, 12),  # the finished block's keys, and the next block's first step
        span(8, 12),
        span(8, 16),
        span(12, 16),
    ]
    assert [bool((call["input_ids"] == MASK).any()) for call in calls] == [True] * 6
    assert output.num_forward_passes == 6


def test_each_row_of_a_ragged_batch_feeds_what_it_feeds_alone(model):
    rows = [span(1, 7), [1], span(1, 11)]  # as many blocks, and at least two masks in each
    options = {"max_new_tokens": 9, "block_length": 4, "denoising_steps": 2, **STATIC}
    with recorded(model) as calls:
        generate(model, rows, **options)
    together = columns_fed(calls)
    for row in rows:
        with recorded(model) as calls:
            generate(model, [row], **options)
        passes = iter(together)
        for [fed] in columns_fed(calls):  # in this order, in some of the passes of the batch
            assert any(fed in windows for windows in passes)


def test_a_finished_blocks_keys_are_written_by_the_next_blocks_first_forward_and_the_last_blocks_are_not(model):
    options = {"max_new_tokens": 10, "block_length": 4, "denoising_steps": 4, **STATIC}
    output = generate(model, [span(1, 7), [1]], **options)
    cache = output.past_key_values
    assert cache.final_lengths == [12, 8]  # of the canvases of 16 and 12 columns
    sequences = output.sequences
    with torch.no_grad():
        for row, (start, written) in enumerate([(0, 12), (5, 8)]):
            tokens = sequences[row : row + 1, start : start + written]
            fresh = model(
                input_ids=tokens, position_ids=torch.arange(written)[None], use_cache=True, block_size=4
            ).past_key_values
            for kept, expected in zip(cache.layers, fresh.layers, strict=True):
                torch.testing.assert_close(kept.keys[row, :, :written], expected.keys[0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(kept.values[row, :, :written], expected.values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
@pytest.mark.parametrize("number", [1, 2, 3, 20])
def test_static_quotas_take_exactly_the_denoising_steps(model, block_length, number):
    """Of whole blocks: one that is cut is done as soon as what is shown of it is."""
    prompt, width = span(1, 11), -(-22 // block_length) * block_length
    with recorded(model) as calls:
        output = generate(
            model, [prompt], max_new_tokens=width - 10, block_length=block_length, denoising_steps=number, **STATIC
        )
    ends = range(block_length, width + 1, block_length)
    masks = [min(end - 10, block_length) for end in ends if 10 < end]
    assert output.num_forward_passes == len(calls) == sum(min(count, number) for count in masks)


def test_without_a_number_of_steps_there_is_one_forward_pass_for_each_token_decoded(model):
    with recorded(model) as calls:
        output = generate(model, [[1, 2, 3]], max_new_tokens=9, block_length=4, **STATIC)
    assert output.num_forward_passes == len(calls) == 9
    assert output.tokens_per_forward.tolist() == [1]


def test_a_prompt_no_longer_than_a_piece_adds_no_forward_pass(model):
    options = {"max_new_tokens": 8, "block_length": 4, "denoising_steps": 2, "prefill_chunk_size": 16, **STATIC}
    assert generate(model, [span(1, 17)], **options).num_forward_passes == 4
    assert generate(model, [span(1, 20)], **options).num_forward_passes == 5  # three blocks, one mask in the first
    assert generate(model, [span(1, 21)], **options).num_forward_passes == 5  # one piece more
    assert generate(model, [span(1, 41)], **options).num_forward_passes == 6


@pytest.mark.parametrize("chunk", [4, 2048])
def test_no_row_asks_for_logits_outside_of_its_window(model, chunk):
    """Nor does one that has ended or that has no block left, while others go on. (On a GPU that would be an error.)"""
    rows = [[5, 17, 33], span(1, 18), [MASK, *span(1, 18), MASK], [], [40]]
    options = {"max_new_tokens": 24, "block_length": 4, "prefill_chunk_size": chunk, **STATIC}
    free = generate(model, rows, eos_token_id=[], **options).sequences[:, 19:]
    with recorded(model) as calls:
        generate(model, rows, eos_token_id=free[[0, 1], [1, 3]].tolist(), **options)
    for call in calls:
        assert (call["logits_to_keep"] < call["input_ids"].shape[1]).all()


def test_the_head_sees_the_block_alone(model):
    with recorded(model.lm_head) as seen:
        generate(model, [span(1, 11), [1]], max_new_tokens=9, block_length=4, **STATIC)
    assert {hidden_states.shape[1] for hidden_states in seen} == {4}


# --- block length 1 is a causal model that reads its own mask


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


def test_the_mask_is_never_proposed_nor_left(model):
    output = generate(model, [span(1, 7), []], max_new_tokens=13, temperature=1.0, remasking_strategy="origin", steps=3)
    assert MASK not in output.sequences


def test_left_padding_of_any_token_changes_nothing(model):
    rows = [span(1, 10), [3], []]
    options = {"max_new_tokens": 8, **STATIC}
    expected = model.diffusion_generate(**left_pad(rows), **options)[:, 9:]
    for pad in (MASK, 0, VOCAB + 7):
        assert model.diffusion_generate(**left_pad(rows, pad=pad), **options)[:, 9:].tolist() == expected.tolist()
