"""Token editing: the rules of LLaDA2.1's `generate`, written once more over whole passes, and what they mean for a caller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..builders import END, MASK, VOCAB, generate, new_tokens, tiny_model
from ..contracts.calls import prompts

EDITING = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.3, "editing_threshold": 0.1}


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


@settings(max_examples=60)
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
