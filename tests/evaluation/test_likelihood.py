"""A likelihood is what its definition says, computed here with a forward pass for each mask and each block."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dllm_hf.evaluation.likelihood import log_likelihood

from ..builders import MASK, left_pad, new_model

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


# Tokens 1, 2 and 5 alone are scored.
BETWEEN = {
    "dream": [((0, 10), None, [[1, 2, 5]])],
    "sdar": [((0, 4), None, [[1, 2]]), ((4, 8), None, [[5]])],
    # The prompt is all 10 tokens: its blocks of 4 end with it, and the first is cut short.
    "nemotron_diffusion": [((0, 2), None, [[1]]), ((2, 6), 2, [[5]])],
}


@pytest.mark.parametrize("family", BETWEEN)
def test_tokens_may_be_given_anywhere(family):
    model = double(family)
    labels = torch.tensor([[token if at in (1, 2, 5) else -100 for at, token in enumerate(TEXT)]])
    found = model.log_likelihood(torch.tensor([TEXT]), labels=labels)
    torch.testing.assert_close(found.log_likelihood.item(), defined(model, BETWEEN[family]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_likelihood_is_what_its_definition_says(case):
    family, changes, options, blocks = CASES[case]
    model = double(family, **changes)
    model.generation_config.update(**options)
    found = model.log_likelihood(torch.tensor([TEXT]), labels=torch.tensor([LABELS]))
    assert found.standard_error.item() == 0 and found.num_tokens.item() == 7
    torch.testing.assert_close(found.log_likelihood.item(), defined(model, blocks), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_a_batch_gives_each_row_what_it_gets_alone(family):
    """Also padded on either side, in passes of any size, and with masks that are drawn."""
    model = double(family, **({"block_size": 16} if family == "sdar" else {}))
    rows = [TEXT, TEXT[2:], TEXT[:1], TEXT + TEXT]
    together = model.log_likelihood(**left_pad(rows), num_samples=16, batch_size=5, seed=3)
    flipped = {name: value.flip(1) for name, value in left_pad([row[::-1] for row in rows]).items()}
    on_the_right = model.log_likelihood(**flipped, num_samples=16, seed=3)
    for index, row in enumerate(rows):
        alone = model.log_likelihood(torch.tensor([row]), num_samples=16, seed=3)
        for name in ("log_likelihood", "standard_error", "num_tokens"):
            for output in (together, on_the_right):
                torch.testing.assert_close(getattr(output, name)[index], getattr(alone, name)[0])
    assert together.standard_error[3] > 0 and together.standard_error[2] == 0
    another = model.log_likelihood(**left_pad(rows), num_samples=16, seed=4)
    assert another.log_likelihood[3] != together.log_likelihood[3]


class Table(nn.Module):
    """The log-probability of a position depends on all that is masked: on the number alone, and on each position."""

    sees_earlier_blocks, logits_shift, causal_context, device = False, 0, False, torch.device("cpu")

    def __init__(self, length: int):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=64, mask_token_id=MASK, max_position_embeddings=None)
        self.generation_config = SimpleNamespace(mask_token_id=None)
        self.by_pair = torch.randn(length, length, dtype=torch.float64)
        self.by_number = torch.linspace(0, 6, length + 1, dtype=torch.float64) ** 1.5

    def log_odds(self, masked: torch.Tensor) -> torch.Tensor:
        """`(..., length)` bool -> of the token at each position against the only other one."""
        return 3 + masked.double() @ self.by_pair - self.by_number[masked.sum(-1)][..., None]

    log_likelihood = log_likelihood

    def predict_noisy(self, input_ids, attention_mask, labels, logits_to_keep):
        odds = self.log_odds(input_ids == MASK).gather(1, logits_to_keep)
        logits = torch.full((*logits_to_keep.shape, 64), -torch.inf, dtype=torch.float64)
        target = labels.gather(1, logits_to_keep).clamp(min=0)
        logits.scatter_(2, (target + 1)[..., None] % 60, 0.0)
        return SimpleNamespace(logits=logits.scatter(2, target[..., None], odds[..., None]))

    def exact(self, length: int) -> float:
        masked = (torch.arange(1, 2**length)[:, None] >> torch.arange(length)) & 1 == 1
        sizes = masked.sum(1)
        logs = nn.functional.logsigmoid(self.log_odds(masked)) * masked
        counts = torch.tensor([math.comb(length, int(size)) for size in sizes])
        return (logs.sum(1) / sizes / counts).sum().item()


def estimates(model: Table, length: int, number: int, num_samples: int):
    """As many estimates of one bound: what the table says does not depend on the text, and the masks do."""
    texts = torch.randint(0, 59, (number, length))
    return model.log_likelihood(texts, num_samples=num_samples, batch_size=2048)


def test_standard_errors_are_honest():
    """Of 800 estimates from drawn masks, the mean is the exact bound, the spread is the standard error that they tell, and
    about 95% of the intervals of 1.96 standard errors hold the exact bound."""
    model = Table(12)
    found = estimates(model, 12, 800, 32)
    errors, told = found.log_likelihood - model.exact(12), found.standard_error
    assert errors.mean().abs() < 4 * errors.std() / 800**0.5
    assert 0.9 < told.square().mean().sqrt() / errors.std() < 1.1
    assert 0.92 < (errors.abs() < 1.96 * told).double().mean() < 0.97
    assert found.num_forward_passes == math.ceil(800 * 32 / 2048)


def test_standard_errors_are_honest_of_a_text_in_blocks():
    """Of 300 draws for each of a model's blocks of 8, of which all masks together are 255, the bounds of the blocks add up to
    the exact one, and their standard errors are those of the sum."""
    model, text = double("sdar", block_size=8), torch.tensor([TEXT + TEXT[::-1]])
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # sure of some tokens and wrong of others, so that masks matter
    exact = model.log_likelihood(text, num_samples=256, batch_size=256)
    drawn = [model.log_likelihood(text, num_samples=24, batch_size=24, seed=seed) for seed in range(300)]
    errors = torch.cat([each.log_likelihood for each in drawn]) - exact.log_likelihood
    told = torch.cat([each.standard_error for each in drawn])
    assert exact.standard_error == 0 and errors.mean().abs() < 4 * errors.std() / 300**0.5
    assert 0.85 < told.square().mean().sqrt() / errors.std() < 1.15
    # Of 12 pairs: the intervals hold it a little less often than 95%, of 1,500 in 92%.
    assert 0.87 < (errors.abs() < 1.96 * told).double().mean() < 0.97


def test_stratified_masks_vary_less_than_those_of_the_paper():
    """With as many forward passes; LLaDA draws the number of masks for each of them from all."""
    model, number = Table(12), 32
    ours = estimates(model, 12, 300, number).log_likelihood
    sizes = torch.randint(1, 13, (300, number, 1))
    masked = torch.rand(300, number, 12).argsort(-1).argsort(-1) < sizes
    logs = nn.functional.logsigmoid(model.log_odds(masked)) * masked
    of_the_paper = (logs.sum(-1) * 12 / sizes[..., 0]).mean(-1)
    assert ours.var() < 0.7 * of_the_paper.var()


WRONG = {
    "`num_samples=7` is odd": {"num_samples": 7},
    "`num_samples` must be an integer of at least 2": {"num_samples": 0},
    "`batch_size` must be an integer of at least 1": {"batch_size": 0},
    "`input_ids` must be a": {"input_ids": TEXT},
    "`labels` must have the shape": {"labels": torch.tensor([LABELS[1:]])},
    "`labels` are not the tokens": {"labels": torch.tensor([LABELS]).roll(1)},
    "holds the mask, 60": {"input_ids": torch.tensor([[1, MASK]])},
    "a token that the vocabulary of 64 tokens lacks": {"input_ids": torch.tensor([[1, 64]])},
    "`attention_mask` has holes": {"attention_mask": torch.tensor([[1, 0] * 5])},
    "longer than the 128 positions": {"input_ids": torch.ones(1, 129, dtype=torch.long)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_by_name(message, llada):
    with pytest.raises(ValueError, match=re.escape(message)):
        llada.log_likelihood(**{"input_ids": torch.tensor([TEXT]), **WRONG[message]})


def test_a_row_without_a_scored_token_has_a_likelihood_of_one(llada):
    found = llada.log_likelihood(torch.tensor([TEXT]), labels=torch.full((1, 10), -100))
    assert (found.log_likelihood.item(), found.standard_error.item(), found.num_forward_passes) == (0, 0, 0)
