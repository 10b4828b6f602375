"""Token editing: the rules of LLaDA2.1's `generate`, written once more over whole passes, and what they mean for a caller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf import LLM, SamplingParams

from ..builders import (
    END,
    MASK,
    assert_each_row_is_what_it_is_alone,
    generate,
    new_tokens,
    refused,
    tiny_model,
)
from ..contracts.calls import prompts

# At these thresholds the tiny model replaces tokens for as long as it may.
EDITING = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.3, "editing_threshold": 0.05}
EDITING |= {"max_post_steps": 5, "block_length": 8, "eos_token_id": []}
PLAIN = {name: value for name, value in EDITING.items() if name not in ("editing_threshold", "max_post_steps")}
ROWS = [[5, 17, 33], [8, 9, MASK, 11, 12, 13], [40, MASK]]


@torch.no_grad()
def edited(model, prompt, number, block, threshold, editing, post_steps, ends) -> tuple[list[int], int]:
    """A prompt, in which masks are positions to fill, and `number` more of them: the tokens, and how many passes it took."""
    shown = len(prompt) + number
    length = -(-shown // block) * block if number or MASK in prompt[-(shown % block or block) :] else shown
    text, passes = torch.tensor([prompt + [MASK] * (length - len(prompt))]), 0
    given_tokens = [column < len(prompt) and prompt[column] != MASK for column in range(length)]
    for start in range(0, length, block):
        end, post = min(start + block, length), 0
        if MASK not in text[0, start : min(end, shown)]:
            continue
        while True:
            masked = text[0, start:end] == MASK
            post += not masked.any()
            if post > post_steps:
                break
            positions = torch.arange(end)[None]
            logits = model(input_ids=text[:, :end], position_ids=positions, block_size=block).logits[0, start:]
            passes += 1
            probabilities = logits.softmax(-1)
            logits[:, MASK] = -torch.inf
            best = logits.argmax(-1)
            sure = probabilities.gather(1, best[:, None])[:, 0]
            above = masked & (sure > threshold)
            if masked.any() and not above.any():
                above[torch.where(masked, sure, -1).argmax()] = True
            own = ~masked & ~torch.tensor(given_tokens[start:end])
            replaced = own & (best != text[0, start:end]) & (sure > editing)
            text[0, start:end] = torch.where(above | replaced, best, text[0, start:end])
            if not masked.any() and not replaced.any():
                break
        if any(token in ends for token in text[0, max(start, len(prompt)) : end].tolist()):
            break
    row = text[0, :shown].tolist()
    stop = next((column + 1 for column in range(len(prompt), shown) if row[column] in ends), shown)
    return row[:stop] + [END] * (shown - stop), passes


@settings(max_examples=20)
@given(
    prompts.filter(len),
    st.integers(0, 9),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    st.integers(0, 4),
    st.sampled_from([[], list(range(6))]),
    st.sampled_from(["block", "none"]),
)
def test_a_row_is_edited_by_the_rules_of_the_original(
    prompt, number, block, threshold, editing, post_steps, ends, policy
):
    model = tiny_model("llada2")
    expected, passes = edited(model, prompt, number, block, threshold, editing, post_steps, ends)
    options = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": threshold, "block_length": block}
    options |= {"editing_threshold": editing, "max_post_steps": post_steps, "eos_token_id": ends, "pad_token_id": END}
    output = generate(model, [prompt], max_new_tokens=number, cache_policy=policy, **options)
    assert output.sequences[0].tolist() == expected
    assert output.num_forward_passes <= passes


@pytest.mark.parametrize("policy", ["block", "none"])
def test_each_row_of_a_batch_is_edited_as_it_is_alone(policy):
    model, options = tiny_model("llada2"), {**EDITING, "eos_token_id": [END, *range(4)]}
    assert_each_row_is_what_it_is_alone(model, ROWS, max_new_tokens=14, cache_policy=policy, **options)
    assert_each_row_is_what_it_is_alone(model, ROWS, max_new_tokens=9, temperature=0.7, cfg_scale=0.5, **options)


def test_requests_that_are_edited_and_such_that_are_not_share_their_steps():
    model = tiny_model("llada2")
    every = [EDITING, PLAIN, {**EDITING, "max_post_steps": 0}, {**EDITING, "remasking_strategy": "factor"}]
    llm = LLM(model, max_num_seqs=4)
    outputs = llm.generate([ROWS[0]] * 4, [SamplingParams(max_tokens=20, options=options) for options in every])
    for output, options in zip(outputs, every, strict=True):
        alone = generate(model, [ROWS[0]], max_new_tokens=20, **options)
        assert output.outputs[0].token_ids == alone.sequences[0, len(ROWS[0]) :].tolist()
        assert output.outputs[0].num_forward_passes == alone.num_forward_passes
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 4


def test_neither_a_rare_look_nor_a_hook_changes_a_token():
    model, seen = tiny_model("llada2"), []
    expected = generate(model, ROWS, max_new_tokens=14, **EDITING)

    def watch(step, sequences, logits):
        seen.append(sequences.clone())
        return sequences

    for more in ({"check_interval": 3}, {"generation_tokens_hook_func": watch}):
        output = generate(model, ROWS, max_new_tokens=14, **EDITING, **more)
        assert output.sequences.tolist() == expected.sequences.tolist()
    # A position changed from one token to another.
    changed = [(now != then) & (now != MASK) & (then != MASK) for then, now in zip(seen, seen[1:])]
    assert torch.stack(changed).any()


def test_a_stream_shows_a_block_when_nothing_of_it_changes_any_more():
    class Collected:
        def __init__(self):
            self.tokens = []

        def put(self, tokens):
            self.tokens += tokens.tolist()

        def end(self):
            self.has_ended = True

    streamer = Collected()
    output = generate(tiny_model("llada2"), ROWS[:1], max_new_tokens=14, streamer=streamer, **EDITING)
    assert streamer.has_ended and streamer.tokens == output.sequences[0].tolist()


def test_a_threshold_of_1_edits_nothing_and_costs_nothing():
    model = tiny_model("llada2")
    plain, off = (
        generate(model, ROWS, max_new_tokens=14, **{**PLAIN, **more}) for more in ({}, {"editing_threshold": 1})
    )
    assert off.sequences.tolist() == plain.sequences.tolist()
    assert off.num_forward_passes == plain.num_forward_passes


def test_what_cannot_be_edited_is_refused_with_the_models_that_can():
    for family in ("llada", "dream", "sdar", "gla_dream"):
        refused(
            tiny_model(family), "`editing_threshold=0.5`", "Models that edit.*LLaDA2MoeModelLM", editing_threshold=0.5
        )
    model = tiny_model("llada2")
    refused(model, "`max_post_steps=3`", "give an `editing_threshold`", max_post_steps=3)
    strategy = {"remasking_strategy": "sequential"}
    refused(model, "sequential", "choose one of.*low_confidence_dynamic", editing_threshold=0.5, **strategy)
    for name, value in (("editing_threshold", 1.5), ("max_post_steps", -1), ("max_post_steps", 0.5)):
        refused(model, name, str(value), **{"editing_threshold": 0.5, name: value})


@pytest.mark.parametrize(
    "prompt, number, block, steps, passes",
    [
        (6, 2, 8, 4, 1),  # two masks of a block of 8, at 8 / 4 a step
        (6, 10, 8, 4, 5),  # and a whole block in four
        (7, 9, 16, 16, 5),  # no more steps than tokens: 16 / 9 a step, the remainder first
        (8, 8, 8, 3, 3),
    ],
)
def test_quotas_come_from_the_length_of_the_block(prompt, number, block, steps, passes):
    options = {"remasking_strategy": "low_confidence_static", "block_length": block, "denoising_steps": steps}
    row = list(range(1, 1 + prompt))
    output = generate(tiny_model("llada2"), [row], max_new_tokens=number, eos_token_id=[], **options)
    assert output.num_forward_passes == passes
    assert MASK not in new_tokens(tiny_model("llada2"), row, max_new_tokens=number, **options)
