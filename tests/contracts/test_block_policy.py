"""The cache policy `block` gives what `none` gives, token for token, and computes nothing twice."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllm_hf import STRATEGIES

from ..builders import END, MASK, generate, left_pad, new_tokens, recorded, tiny_model
from .calls import (
    BLOCK_FAMILIES,
    BOUNDS,
    EXAMPLES,
    SEEDED,
    STATIC,
    UNSEEDED,
    assert_cache_is_final,
    assert_policies_agree,
    calls,
    columns_fed,
    models,
    span,
)

FAR = [MASK, *span(1, 16), MASK, MASK, *span(20, 33), MASK]  # given blocks between the masked ones
LONG = [(7 * index) % 59 for index in range(45)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", BLOCK_FAMILIES)
def test_the_cache_changes_no_token_in_any_strategy(family, strategy):
    rows = [[5, MASK, 17, 33, MASK, 8, 9], [], [1, 2, 3]]
    options = {"remasking_strategy": strategy, "max_new_tokens": 9, **BOUNDS.get(strategy, {})}
    assert_policies_agree(tiny_model(family), rows, eos_token_id=[END, *range(3)], **options)


@pytest.mark.parametrize("family", BLOCK_FAMILIES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_cache_changes_no_token(family, data):
    """Ragged batches, masks in the prompt, guidance, pieces of a prompt, ends, samples."""
    model, block_length = data.draw(models(family))
    rows, options = data.draw(calls(st.sampled_from(list(STRATEGIES))))
    assert_policies_agree(model, rows, **block_length, **options)


@pytest.mark.parametrize("family", [family for family in BLOCK_FAMILIES if family not in SEEDED])
@settings(max_examples=EXAMPLES)
@given(data=st.data(), prompt=st.integers(0, 14), number=st.integers(0, 14), steps=st.integers(1, 4))
def test_prompts_of_any_length_take_exactly_the_denoising_steps(family, data, prompt, number, steps):
    """Of whole blocks: one that is cut is done as soon as what is shown of it is."""
    assume(prompt or number)
    model, block_length = data.draw(models(family))
    size = block_length.get("block_length", model.default_block_length)
    number += -(prompt + number) % size if number else 0
    options = {"max_new_tokens": number, "denoising_steps": steps, "eos_token_id": [], **block_length, **STATIC}
    output = assert_policies_agree(model, [span(1, 1 + prompt)], **options)
    starts = range(prompt // size * size, prompt + number, size) if number else []
    masks = [min(start + size - prompt, size) for start in starts]
    whole = [size if model.quota_source == "block" else count for count in masks]
    quotas = [-(-each // min(steps, number)) for each in whole]  # no fewer in any step but those that take what is left
    most = sum(-(-count // quota) for count, quota in zip(masks, quotas))
    assert most <= output.num_forward_passes <= sum(min(count, steps) for count in masks)
    assert model.quota_source == "block" or output.num_forward_passes == sum(min(count, steps) for count in masks)


def test_a_ragged_batch_with_an_empty_prompt_gives_the_same_in_both_policies(model):
    rows = [span(1, 18), [], [5], span(30, 39), [END, END]]
    assert_policies_agree(model, rows, max_new_tokens=13, denoising_steps=3, **STATIC)


def test_rows_that_end_early_give_the_same_in_both_policies(model):
    """Some rows end, one after the other, while one goes on to the end."""
    rows = [[5, 17, 33], [8, 9, 10, 11, 12, 13], [], [40], span(1, 12)]
    options = {"max_new_tokens": 40, **STATIC}
    free = generate(model, rows, eos_token_id=[], cache_policy="none", **options).sequences[:, 11:]
    ends = [int(free[0, 2]), int(free[1, 14]), int(free[2, 23])]
    output = assert_policies_agree(model, rows, eos_token_id=ends, **options)
    lengths = [int((~torch.isin(row, torch.tensor(ends))).cumprod(0).sum()) for row in free]
    for row, whole, length in zip(output.sequences[:, 11:].tolist(), free.tolist(), lengths, strict=True):
        assert row[: length + 1] == whole[: length + 1]
        assert set(row[length + 1 :]) <= {END}


@pytest.mark.parametrize("waits", ["has ended", "has no block left"])
def test_a_long_row_that_waits_does_not_widen_what_a_short_one_sees(model, waits):
    """More of the waiting row is final than the other row has columns."""
    short, long = [1, 2, 3], span(4, 44)
    options = {"max_new_tokens": 20, **STATIC}
    if waits == "has ended":
        options["eos_token_id"] = new_tokens(model, long, **{**options, "max_new_tokens": 1})
    else:
        short, long, options["max_new_tokens"] = [MASK] * 22, [*long, MASK], 0
    assert_policies_agree(model, [short, long], **options)


def test_rows_that_wait_keep_their_cache(model):
    """Rows of different numbers of blocks, given blocks between the masked ones, an empty row."""
    rows = [FAR, [1, 2, 3], [], [*span(1, 6), MASK]]
    assert_policies_agree(model, rows, max_new_tokens=6, denoising_steps=2, **STATIC)


@pytest.mark.parametrize("number, guidance, chunk", [(0, 0.0, 1), (6, 0.0, 2048), (6, 0.9, 6), (0, 0.9, 2048)])
def test_masks_anywhere_in_the_prompt_are_filled_alike_in_both_policies(model, number, guidance, chunk):
    rows = [FAR, [1, 2, MASK, 3], [MASK], [5, 6, 7], [*span(1, 6), MASK]]
    options = {"denoising_steps": 2, "cfg_scale": guidance, "prefill_chunk_size": chunk, **STATIC}
    output = assert_policies_agree(model, rows, max_new_tokens=number, **options)
    assert MASK not in output.sequences
    given = left_pad(rows)["input_ids"]
    assert torch.equal(output.sequences[:, : given.shape[1]][given != MASK], given[given != MASK])


def test_each_of_the_returned_sequences_is_the_same_in_both_policies(model):
    options = {"max_new_tokens": 9, "temperature": 1.0, "num_return_sequences": 3}
    output = assert_policies_agree(model, [[1, 2, 3], [4, 5, 6, 7, 8]], **options)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6


def test_the_history_is_the_same_in_both_policies(model):
    options = {"max_new_tokens": 9, "denoising_steps": 2, "output_history": True, **STATIC}
    rows = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    block, none = (generate(model, rows, cache_policy=policy, **options) for policy in ("block", "none"))
    assert torch.equal(torch.stack(block.history), torch.stack(none.history))
    assert block.num_forward_passes == none.num_forward_passes == len(block.history)


def test_the_logits_are_the_same_in_both_policies(model):
    seen = {"block": [], "none": []}
    for policy, kept in seen.items():
        look = lambda step, sequences, logits, kept=kept: kept.append(logits) or logits
        options = {"max_new_tokens": 8, "cache_policy": policy, "generation_logits_hook_func": look, "eos_token_id": []}
        generate(model, [span(1, 8), [1, 2], [3]], **options, **STATIC)
    assert len(seen["block"]) == len(seen["none"]) > 0
    for block, none in zip(*seen.values(), strict=True):
        torch.testing.assert_close(block, none, atol=1e-4, rtol=1e-4)


def test_a_criterion_ends_a_row_in_both_policies(model):
    def long_enough(input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 10] * len(input_ids))

    rows, options = [[1, 2, 3], [4, 5, 6]], {"max_new_tokens": 20, "eos_token_id": [], **STATIC}
    output = assert_policies_agree(model, rows, stopping_criteria=[long_enough], **options)
    assert (output.sequences[:, 12:] == END).all()


# --- hooks that change what is final


def assert_a_hook_changes_nothing_between_the_policies(model, rows, make_hook, **options):
    """`make_hook()`: a hook with a memory of its own. Returns the sequences."""
    block, none = (
        generate(model, rows, generation_tokens_hook_func=make_hook(), cache_policy=policy, **options, **STATIC)
        for policy in ("block", "none")
    )
    assert block.sequences.tolist() == none.sequences.tolist()
    assert MASK not in block.sequences
    return block.sequences.tolist()


def rewrites(when: int, first: int, last: int, token: int):
    """A hook that puts a token into some columns in its call number `when`."""
    calls = []

    def hook(step, sequences, logits):
        calls.append(step)
        sequences = sequences.clone()
        if len(calls) == when:
            sequences[:, first:last] = token
        return sequences

    return hook


@pytest.mark.parametrize(
    "rows, token, guidance",
    [
        ([[1, 2, 3]], 50, 0.7),
        ([[1, 2, 3]], MASK, 0.0),
        ([[1, 2, 3], [4, 5]], 50, 0.0),
        ([[1, 2, 3], [4, 5]], MASK, 0.7),
    ],
    ids=["text", "masks", "text of two rows", "masks in two rows"],
)
def test_a_hook_that_changes_finished_blocks_changes_nothing_between_the_policies(model, rows, token, guidance):
    """What it changes in the third block is final already: a state cannot go back in part, keys can."""
    options = {"max_new_tokens": 25, "denoising_steps": 2, "cfg_scale": guidance}
    assert_a_hook_changes_nothing_between_the_policies(model, rows, lambda: rewrites(6, 1, 7, token), **options)


def test_a_hook_that_puts_masks_back_into_the_block_changes_nothing_between_the_policies(model):
    """It doubts what it sees a few times, and the tokens it removes are decoded again."""
    doubts = []

    def make_hook():
        done = []
        doubts.append(done)

        def doubt(step, sequences, logits):
            if logits is not None and len(done) < 6:
                last = int((sequences[0] != MASK).nonzero().max())
                sequences = sequences.clone()
                sequences[0, max(last, 3)] = MASK
                done.append(step)
            return sequences

        return doubt

    assert_a_hook_changes_nothing_between_the_policies(model, [[1, 2, 3]], make_hook, max_new_tokens=10)
    assert [len(done) for done in doubts] == [6, 6]


def test_a_hook_that_fills_a_whole_block_changes_nothing_between_the_policies(model):
    """The block then makes no forward pass: the one before it becomes final by that of the block after it."""

    def fill(step, sequences, logits):
        if step == 2:
            sequences = sequences.clone()
            sequences[0, 8:12] = torch.tensor([40, 41, 42, 43])
        return sequences

    options = {"max_new_tokens": 25, "denoising_steps": 2}
    [row] = assert_a_hook_changes_nothing_between_the_policies(model, [[1, 2, 3, 4]], lambda: fill, **options)
    assert row[8:12] == [40, 41, 42, 43]


# --- what a forward pass feeds


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_step_feeds_the_block_and_its_first_also_what_is_final_but_not_in_the_cache(model):
    with recorded(model) as calls:
        output = generate(model, [span(1, 6)], max_new_tokens=10, denoising_steps=2, eos_token_id=[], **STATIC)
    assert [fed for [fed] in columns_fed(calls)] == [
        span(0, 8),  # the prompt's whole block, and the first block with the prompt's remainder
        span(4, 8),
        span(4, 12),  # the finished block, and the next block's first step
        span(8, 12),
        span(8, 16),
        span(12, 16),
    ]
    assert [bool((call["input_ids"] == MASK).any()) for call in calls] == [True] * 6
    assert output.num_forward_passes == 6


def test_each_row_of_a_ragged_batch_feeds_what_it_feeds_alone(model):
    rows = [span(1, 7), [1], span(1, 11)]  # as many blocks, and at least two masks in each
    options = {"max_new_tokens": 9, "denoising_steps": 2, **STATIC}
    with recorded(model) as calls:
        generate(model, rows, **options)
    together = columns_fed(calls)
    for row in rows:
        with recorded(model) as calls:
            generate(model, [row], **options)
        passes = iter(together)
        for [fed] in columns_fed(calls):  # in this order, in some of the passes of the batch
            assert any(fed in windows for windows in passes)


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_finished_block_is_final_with_the_next_block_s_first_pass_and_the_last_block_never(model):
    options = {"max_new_tokens": 10, "denoising_steps": 4, "eos_token_id": [], **STATIC}
    cache = generate(model, [span(1, 7), [1]], **options).past_key_values
    assert cache.final_lengths == [12, 8]  # of the canvases of 16 and 12 columns
    assert_cache_is_final(model, cache)


@pytest.mark.parametrize("kind", UNSEEDED)
def test_the_head_sees_the_block_alone(model):
    with recorded(model.lm_head) as seen:
        generate(model, [span(1, 11), [1]], max_new_tokens=9, **STATIC)
    assert {hidden_states.shape[1] for hidden_states in seen} == {4}


@pytest.mark.parametrize("kind", UNSEEDED)
def test_pieces_of_a_prompt_are_computed_without_the_head(model):
    with recorded(model.lm_head) as seen:
        generate(model, [span(1, 22)], max_new_tokens=3, prefill_chunk_size=8, eos_token_id=[], **STATIC)
    assert [hidden_states.shape[1] for hidden_states in seen] == [0, 0, 4, 4, 4]


@pytest.mark.parametrize("chunk", [1, 6, 8])
def test_a_prompt_computed_in_pieces_gives_the_same(model, chunk):
    """Pieces shorter than a block, and no multiple of it: they are rounded to whole blocks."""
    rows, options = [LONG, span(3, 20), [1]], {"max_new_tokens": 9, **STATIC}
    with recorded(model) as calls:
        in_pieces = generate(model, rows, prefill_chunk_size=chunk, **options)
    assert in_pieces.sequences.tolist() == generate(model, rows, **options).sequences.tolist()
    assert max(call["input_ids"].shape[1] for call in calls) <= max(chunk // 4, 1) * 4 + 4


@pytest.mark.parametrize("chunk", [4, 2048])
def test_no_row_asks_for_logits_outside_of_its_window(model, chunk):
    """Nor does one that has ended or that has no block left, while others go on. (On a GPU that would be an error.)"""
    rows = [[5, 17, 33], span(1, 18), [MASK, *span(1, 18), MASK], [], [40]]
    options = {"max_new_tokens": 24, "prefill_chunk_size": chunk, **STATIC}
    free = generate(model, rows, eos_token_id=[], **options).sequences[:, 19:]
    with recorded(model) as calls:
        generate(model, rows, eos_token_id=free[[0, 1], [1, 3]].tolist(), **options)
    for call in calls:
        assert (call["logits_to_keep"] < call["input_ids"].shape[1]).all()


@pytest.mark.parametrize("kind", UNSEEDED)
def test_a_prompt_no_longer_than_a_piece_adds_no_forward_pass(model):
    options = {"max_new_tokens": 8, "denoising_steps": 2, "prefill_chunk_size": 16, "eos_token_id": [], **STATIC}
    assert generate(model, [span(1, 17)], **options).num_forward_passes == 4
    assert generate(model, [span(1, 20)], **options).num_forward_passes == 5  # three blocks, one mask in the first
    assert generate(model, [span(1, 21)], **options).num_forward_passes == 5  # one piece more
    assert generate(model, [span(1, 41)], **options).num_forward_passes == 6


def test_without_a_number_of_steps_there_is_one_forward_pass_for_each_token_decoded(model):
    with recorded(model) as calls:
        output = generate(model, [[1, 2, 3]], max_new_tokens=9, eos_token_id=[], **STATIC)
    assert output.num_forward_passes == len(calls) == 9
    assert output.tokens_per_forward.tolist() == [1]


# --- what is refused


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_approximate_caches_are_not_offered(model, policy):
    with pytest.raises(ValueError, match="cache_policy.*choose one of block, none"):
        generate(model, [[1, 2]], max_new_tokens=4, cache_policy=policy)
