"""A likelihood is what its definition says, computed here with a forward pass for each mask and each block."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ..builders import BUILDERS, END, MASK, left_pad, new_model

TEXT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]
LABELS = [-100] * 3 + TEXT[3:]  # three tokens are given
# How the scored tokens are decoded in blocks of 4: each block with its seed and its parts, one after the other.
WHOLE = [((0, 10), None, [range(3, 10)])]
FROM_0 = [((0, 4), None, [[3]]), ((4, 8), None, [range(4, 8)]), ((8, 12), None, [[8, 9]])]
FROM_PROMPT = [((3, 7), 3, [[4, 5, 6]]), ((7, 10), 7, [[8, 9]])]
SEEDED = [((0, 4), None, [[3]]), ((4, 8), 4, [[5, 6, 7]]), ((8, 12), 8, [[9]])]
SUB_BLOCKS = [((0, 4), None, [[3]]), ((4, 8), 4, [[5], [6, 7]]), ((8, 12), 8, [[9]])]
CASES = {
    **{family: (family, {}, {}, WHOLE) for family in ("llada", "llada_moe", "dream")},
    **{family: (family, {}, {}, FROM_0) for family in ("sdar", "sdar_moe", "llada2", "gla_dream")},
    "gla_dream, shifted": ("gla_dream", {"logits_shift": 1}, {}, FROM_0),
    "nemotron_diffusion": ("nemotron_diffusion", {}, {}, FROM_PROMPT),
    "fast_dllm_v2": ("fast_dllm_v2", {}, {}, SEEDED),
    "fast_dllm_v2, sub-blocks": ("fast_dllm_v2", {}, {"small_block_size": 2}, SUB_BLOCKS),
}


def double(family: str, **changes):
    model = new_model(family, **changes).double()
    model.config._experts_implementation = "eager"  # the library's grouped products are for shorter numbers
    return model


def log_prob(model, tokens: list[int], position: int, target: int, block: tuple[int, int] | None) -> float:
    """Of a token, by a pass over the text up to the end of its block; `block` is None for a pass over clean text."""
    options = {}
    if model.causal_context:
        index, start = torch.arange(len(tokens)), len(tokens) if block is None else block[0]
        sees = (index <= index[:, None]) | (index[:, None] >= start)
        options = {"attention_mask": torch.where(sees, 0.0, -torch.inf).double()[None, None]}
    shift = 1 if block is None else model.logits_shift
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False, **options).logits
    return logits[0, max(position - shift, 0)].log_softmax(-1)[target].item()


def defined(model, blocks) -> float:
    """The bound on the log-likelihood of the scored tokens, from its definition."""
    canvas, total = [*TEXT, MASK, MASK], 0.0  # decoding fills up a last block that is counted from 0
    for block, seed, parts in blocks:
        if seed is not None:
            total += log_prob(model, TEXT[:seed], seed, TEXT[seed], None)
        for index, part in enumerate(parts):
            later = [at for one in parts[index + 1 :] for at in one]
            for size in range(1, len(part) + 1):
                for hidden in itertools.combinations(part, size):
                    noisy = [MASK if at in (*later, *hidden) else canvas[at] for at in range(block[1])]
                    found = sum(log_prob(model, noisy, at, TEXT[at], block) for at in hidden)
                    total += found / size / math.comb(len(part), size)
    return total


@pytest.mark.parametrize("case", CASES)
def test_a_likelihood_is_what_its_definition_says(case):
    family, changes, options, blocks = CASES[case]
    model = double(family, **changes)
    model.generation_config.update(**options)
    found = model.log_likelihood(torch.tensor([TEXT]), labels=torch.tensor([LABELS]))
    assert found.standard_error.item() == 0 and found.num_tokens.item() == 7
    torch.testing.assert_close(found.log_likelihood.item(), defined(model, blocks), atol=1e-9, rtol=0)
