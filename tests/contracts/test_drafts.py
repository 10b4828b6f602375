"""Drafts change no token: several steps in a forward pass are those of one step at a time, for every family and policy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf.generation.configuration import CACHE_DTYPES
from dllm_hf.generation.remasking import STRATEGIES

from ..builders import END, MASK, generate, generators, tiny_model
from .calls import paces, prompts

DRAFTED = [name for name, each in STRATEGIES.items() if not each.is_adaptive and each.confidence != "random"]
calls = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 14),
        "block_length": st.sampled_from([2, 4, 8]),
        "remasking_strategy": st.sampled_from(DRAFTED),
        "eos_token_id": st.sampled_from([[], [END, *range(10)]]),
        "suppress_tokens": st.sampled_from([None, [7]]),
        "cfg_scale": st.sampled_from([0.0, 0.0, 0.5]),
        "cache_dtype": st.sampled_from([None, *CACHE_DTYPES]),
    }
)


def both(model, rows, drafts, **options):
    """The outputs of one step at a time and with drafts, which must be the same."""
    found = []
    for draft_steps in (0, drafts):
        own = generators(range(len(rows)))
        found.append(generate(model, rows, generator=own, draft_steps=draft_steps, **options))
    alone, drafted = found
    assert drafted.sequences.tolist() == alone.sequences.tolist()
    # A row's tokens are the same, and no more passes of its own bring them; those of a batch may part.
    assert (drafted.tokens_per_forward >= alone.tokens_per_forward).all()
    assert len(rows) > 1 or drafted.num_forward_passes <= alone.num_forward_passes
    return alone, drafted


@settings(max_examples=2)
@given(st.lists(prompts, min_size=1, max_size=3), calls, paces, st.integers(1, 5))
def test_drafts_change_no_token(pair, rows, options, pace, drafts):
    family, policy = pair
    model = tiny_model(family)
    if model.has_fixed_block_length:
        options = {**options, "block_length": model.default_block_length}
    if policy == "none" or options["cache_dtype"] not in model.cache_dtypes:
        options = {**options, "cache_dtype": None}
    both(model, rows, drafts, cache_policy=policy, **options, **pace)


@pytest.mark.parametrize("strategy", DRAFTED)
def test_drafts_of_each_strategy_are_accepted_and_change_no_token(pair, strategy):
    """Of rows of different lengths, of which one has a token that is given between masks; several blocks, two tokens a step."""
    family, policy = pair
    model, rows = tiny_model(family), [[5, 6, 7, 8, 9], [12], [3, MASK, 4]]
    options = {"max_new_tokens": 19, "block_length": model.default_block_length if model.has_fixed_block_length else 8}
    options |= {"remasking_strategy": strategy, "eos_token_id": []}
    found = [both(model, rows, 5, cache_policy=policy, **options, **pace) for pace in ({}, {"denoising_steps": 4})]
    assert sum((drafted.tokens_per_forward - alone.tokens_per_forward).sum() for alone, drafted in found) > 0


def test_history_and_log_probabilities_are_those_of_one_step_at_a_time(pair):
    family, policy = pair
    rows = [[5, 6, 7, 8, 9], [12, 13]]
    options = {"max_new_tokens": 8, "block_length": 4, "remasking_strategy": "maskgit_plus", "steps": 12}
    alone, drafted = both(tiny_model(family), rows, 3, cache_policy=policy, output_history=True, logprobs=2, **options)
    assert [each.tolist() for each in drafted.history] == [each.tolist() for each in alone.history]
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(drafted[name], alone[name], equal_nan=True)


def test_hooks_that_change_tokens_and_logits_see_and_do_the_same(pair):
    """The guesses know of neither: they are wrong where a hook has been."""
    family, policy = pair
    model, rows, found = tiny_model(family), [[5, 6, 7, 8, 9], [12, 13]], []
    options = {"max_new_tokens": 16, "remasking_strategy": "low_confidence_static", "cache_policy": policy}
    options["block_length"] = model.default_block_length if model.has_fixed_block_length else 8
    for drafts in (0, 4):
        seen = []

        def of_tokens(step, sequences, logits, seen=seen):
            seen.append((step, sequences.tolist()))
            if step == 3:
                sequences[:, -6] = 33
            return sequences

        def of_logits(step, sequences, logits, seen=seen):
            seen.append((step, sequences.tolist()))
            return logits + 3 * (torch.arange(logits.shape[-1]) == 40) if step == 5 else logits

        hooks = {"generation_tokens_hook_func": of_tokens, "generation_logits_hook_func": of_logits}
        output = generate(model, rows, draft_steps=drafts, eos_token_id=[], **options, **hooks)
        found.append((seen, output.sequences.tolist(), output.num_forward_passes))
    (seen, tokens, passes), (same, again, fewer) = found
    assert (same, again) == (seen, tokens) and 33 in tokens[0] and fewer < passes
