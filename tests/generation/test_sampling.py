"""Logits to proposals and confidences, against a plain softmax in float64."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dllm_hf import STRATEGIES
from dllm_hf.generation.sampling import Noise, filtered, first_of_the_largest, guide, process, propose

from ..builders import (
    END,
    MASK,
    TURN_END,
    VOCAB,
    ScriptedModel,
    generate,
    generators,
    new_tokens,
    recorded,
    script,
    tiny_model,
)

TEMPERATURES = [0.0, 0.7, 3.0]
WITH_CONFIDENCE = [
    "low_confidence_static",
    "low_confidence_dynamic",
    "maskgit_plus",
    "topk_margin",
    "entropy",
    "random",
]


CPU = torch.device("cpu")
SCORES = frozenset(["probability", "margin", "neg_entropy"])


def row_noise(seeds, width):
    return Noise(CPU, generators(seeds), [width] * len(seeds))


def random_logits(*shape, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale


# --- proposals


def test_temperature_0_proposes_the_arg_max():
    logits = random_logits(2, 5, VOCAB)
    logits[..., MASK] = -1
    assert propose(logits, MASK, ())[0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("samples", [False, True])
def test_the_mask_is_never_proposed(samples):
    logits = random_logits(2, 5, VOCAB)
    logits[..., MASK] = 100.0
    before = logits.clone()
    assert MASK not in propose(logits, MASK, (), row_noise([1, 2], 5).gumbel(logits.shape) if samples else None)[0]
    assert torch.equal(logits, before)


def test_draws_are_as_frequent_as_the_softmax_says():
    draws = 40_000
    logits = random_logits(8)
    logits[3] = -torch.inf  # the mask
    gumbel = row_noise([0], draws).gumbel((1, draws, 8))
    proposals, _ = propose(logits.expand(1, draws, 8).clone(), 3, (), gumbel)
    frequency = proposals.flatten().bincount(minlength=8) / draws
    probability = logits.double().softmax(-1)
    deviation = (probability * (1 - probability) / draws).sqrt()
    assert ((frequency - probability).abs() <= 5 * deviation).all()


def test_a_list_of_generators_draws_each_row_from_its_own():
    logits = random_logits(3, 4, VOCAB)
    together = row_noise([7, 8, 9], 4).gumbel(logits.shape)
    for row, seed in enumerate([7, 8, 9]):
        assert torch.equal(together[row], row_noise([seed], 4).gumbel((1, 4, VOCAB))[0])


def test_a_row_that_needs_no_numbers_leaves_its_generator_as_it_is():
    first, second = generators([1, 2])
    Noise(CPU, [first, second], [4, 0]).gumbel((2, 4, VOCAB))
    assert torch.equal(second.get_state(), torch.Generator().manual_seed(2).get_state())


def test_top_k_top_p_and_min_p_are_the_librarys_in_its_order_with_numbers_of_each_row():
    rows = [
        (0, 1.0, 0.0),
        (10, 1.0, 0.0),
        (0, 0.8, 0.0),
        (0, 1.0, 0.1),
        (10, 0.8, 0.1),
        (1, 1.0, 0.0),
        (1000, 0.05, 1.0),
    ]
    logits = random_logits(len(rows), 6, VOCAB)
    logits[:, 0, 3:9] = logits[:, 0, 3:4]  # some that tie
    got = filtered(logits, *(torch.tensor(column)[:, None, None] for column in zip(*rows)))
    for row, (top_k, top_p, min_p) in enumerate(rows):
        expected = logits[row]
        for warper, number in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
            if number and (warper is not TopPLogitsWarper or number < 1):
                expected = warper(number)(None, expected)
        assert torch.equal(got[row], expected), rows[row]


def test_a_processor_sees_a_row_for_each_position_and_the_sequence_it_is_in():
    seen = []

    def note(input_ids, scores):
        seen.append((input_ids, scores.shape))
        return scores

    process(LogitsProcessorList([note]), torch.tensor([[1, 2, 3], [4, 5, 6]]), random_logits(2, 4, VOCAB))
    [(input_ids, shape)] = seen
    assert shape == (8, VOCAB)
    assert input_ids.tolist() == [[1, 2, 3]] * 4 + [[4, 5, 6]] * 4


# --- confidence


def test_confidences_are_those_of_a_plain_softmax():
    logits = random_logits(2, 5, VOCAB)
    proposals, actuals = propose(logits, MASK, SCORES)
    probabilities = logits.double().softmax(-1)
    best, second = probabilities.sort(-1, descending=True).values[..., :2].unbind(-1)
    expected = {
        "probability": probabilities.gather(-1, proposals[..., None]).squeeze(-1),
        "neg_entropy": (probabilities * probabilities.log()).sum(-1),
        "margin": best - second,
    }
    for kind, scores in expected.items():
        actual = actuals[kind]
        assert actual.dtype == torch.float32
        if kind == "margin":
            # Where the mask itself is best, the margin of the best other token over it is meant.
            other = probabilities.clone()
            other[..., MASK] = 0
            best, second = other.sort(-1, descending=True).values[..., :2].unbind(-1)
            scores = best - torch.maximum(second, probabilities[..., MASK])
        torch.testing.assert_close(actual.double(), scores, atol=1e-6, rtol=1e-5)


def test_confidences_stay_finite_where_warpers_removed_tokens():
    numbers = (torch.tensor([[[value]]]) for value in (2, 0.5, 0.0))
    _, scores = propose(filtered(random_logits(1, 5, VOCAB), *numbers), MASK, SCORES)
    assert all(score.isfinite().all() for score in scores.values())


def test_random_confidence_comes_from_the_generator():
    first, again = (row_noise([1, 2], 5).uniform((2, 5)) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first[0].tolist() != first[1].tolist()


# --- guidance


def test_guidance_is_that_of_llada():
    conditional, unconditional = random_logits(2, 2, 3, VOCAB)
    expected = unconditional + (1.5 + 1) * (conditional - unconditional)
    torch.testing.assert_close(guide(torch.cat([conditional, unconditional]), 1.5), expected)


def test_guidance_doubles_the_batch_and_masks_every_token_of_the_prompt(model, policy):
    with recorded(model) as calls:
        model.diffusion_generate(
            torch.tensor([[5, MASK, 7], [8, MASK, 10]]),
            cfg_scale=0.5,
            max_new_tokens=4,
            block_length=2,
            cache_policy=policy,
        )
    for call in calls:
        columns = call["position_ids"]
        conditional, unconditional = call["input_ids"].chunk(2)
        rows = len(columns) // 2  # fewer than the batch where the others have nothing to fill in this pass
        assert columns.tolist() == columns[:rows].tolist() * 2
        prompt = (columns[:rows] < 3) & (columns[:rows] != 1)  # column 1 is a mask to fill, no token of the prompt
        assert (unconditional[prompt] == MASK).all()
        assert torch.equal(unconditional[~prompt], conditional[~prompt])


def test_guided_decoding_is_decoding_with_the_guided_logits(model):
    prompt, number = [5, 6, 7], 1
    canvas = torch.tensor([[*prompt, MASK]])
    with torch.no_grad():
        position_ids = torch.arange(4)[None]
        conditional = model(input_ids=canvas, position_ids=position_ids).logits
        unconditional = model(input_ids=torch.full_like(canvas, MASK), position_ids=position_ids).logits
    logits = (unconditional + 3.0 * (conditional - unconditional))[0, 3 - model.logits_shift]
    logits[MASK] = -torch.inf
    assert new_tokens(model, prompt, max_new_tokens=number, cfg_scale=2.0) == [int(logits.argmax())]


# --- decoding


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_suppressed_tokens_are_never_proposed(model, strategy, temperature):
    kept = [3, 20]
    options = {"temperature": temperature, "remasking_strategy": strategy, "block_length": 4}
    suppressed = [token for token in range(VOCAB) if token not in kept]
    output = new_tokens(model, [5, 6], suppress_tokens=suppressed, max_new_tokens=8, **options)
    assert set(output) <= set(kept)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logits_eos_inf_suppresses_the_end_of_sequence(temperature):
    model = ScriptedModel(script([END] * 6, 20.0))
    assert END not in new_tokens(model, [], max_new_tokens=6, logits_eos_inf=True, temperature=temperature)


def transfer_order(model, **options):
    """The step at which each position of a continuation is transferred."""
    output = generate(model, [[]], output_history=True, **options)
    return (torch.stack(output.history)[:, 0] == MASK).sum(0).tolist()


@pytest.mark.parametrize("alg_temp", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("strategy", WITH_CONFIDENCE)
@pytest.mark.parametrize("unwanted", [{"confidence_suppress_tokens": [9]}, {"confidence_eos_eot_inf": True}], ids=str)
def test_a_position_with_a_token_of_suppressed_confidence_is_transferred_last(
    strategy, temperature, alg_temp, unwanted
):
    """The positions that propose it are by far the surest ones."""
    certain = 9 if "confidence_suppress_tokens" in unwanted else END
    model = ScriptedModel(script([certain, 1, 2, certain, 3, 4], [90.0, 60, 60, 90, 60, 60]))
    options = {"temperature": temperature, "alg_temp": alg_temp, "confidence_threshold": 1.0}
    order = transfer_order(model, max_new_tokens=6, remasking_strategy=strategy, **unwanted, **options)
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    assert {order[0], order[3]} == {4, 5}


def test_confidence_eos_eot_inf_holds_back_the_end_of_a_turn_too():
    model = ScriptedModel(script([TURN_END, 1, 2], [90.0, 60, 60]), eot_token_id=TURN_END)
    assert transfer_order(model, max_new_tokens=3, confidence_eos_eot_inf=True)[0] == 2


def test_the_same_seed_gives_the_same_tokens(model, policy):
    def run(seed):
        options = {"temperature": 1.5, "max_new_tokens": 12, "block_length": 4, "cache_policy": policy}
        return new_tokens(model, [5, 6], generator=torch.Generator().manual_seed(seed), **options)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_generator_leaves_the_global_one_alone(llada):
    state = torch.get_rng_state()
    for strategy in STRATEGIES:
        options = {"temperature": 1.0, "remasking_strategy": strategy, "max_new_tokens": 4}
        new_tokens(llada, [5], generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_seed_decides(llada):
    def run():
        torch.manual_seed(0)
        return new_tokens(llada, [5], temperature=1.5, max_new_tokens=8)

    assert run() == run()


def test_returned_sequences_differ_where_they_are_sampled():
    output = generate(tiny_model("llada"), [[5]], num_return_sequences=4, temperature=2.0, max_new_tokens=8).sequences
    assert len({tuple(row) for row in output.tolist()}) > 1


def test_do_sample_false_is_temperature_0(model):
    options = {"max_new_tokens": 8, "remasking_strategy": "sequential"}
    greedy = new_tokens(model, [5, 6], **options)
    assert new_tokens(model, [5, 6], temperature=2.0, do_sample=False, **options) == greedy
    assert new_tokens(model, [5, 6], temperature=2.0, top_k=1, **options) == greedy


@pytest.mark.parametrize("source, first", [("raw", 0), ("processed", 1)])
def test_confidence_is_read_where_the_family_says(source, first):
    """top_k=1 makes a processed distribution certain, and every position alike: the leftmost goes first."""
    model = ScriptedModel(script([1, 2], [2.0, 5.0]))
    model.confidence_source = source
    order = transfer_order(model, max_new_tokens=2, top_k=1)
    assert order == ([1, 0] if source == "raw" else [0, 1])


def test_the_mask_counts_in_the_confidence_at_every_temperature():
    """Of a mask that is as probable as the best token, and a threshold between half of its probability and all of it."""
    logits = script([5, 6, 7, 8], 12.0)
    logits[:, MASK] = 12.0
    model = ScriptedModel(logits)
    model.confidence_source = "processed"
    for temperature in (0.0, 0.999, 1.0, 1.001):
        output = generate(model, [[]], max_new_tokens=4, confidence_threshold=0.7, temperature=temperature)
        assert output.num_forward_passes == 4, temperature


def test_top_k_ranks_tokens_and_not_the_mask():
    logits = script([5, 6, 7, 8], 12.0)
    logits[:, MASK] = 13.0
    model = ScriptedModel(logits)
    model.confidence_source = "processed"
    options = {"temperature": 1.0, "top_k": 1, "confidence_threshold": 0.99}
    output = generate(model, [[]], max_new_tokens=4, **options)
    assert output.sequences.tolist() == [[5, 6, 7, 8]]
    assert output.num_forward_passes == 1


@pytest.mark.parametrize("vocab", [3, 128, 300, 512])
def test_the_two_level_arg_max_is_the_first_of_the_largest(vocab):
    logits = torch.randint(0, 3, (4, 50, vocab), generator=torch.Generator().manual_seed(0)).float()
    logits[0, 0], logits[0, 1], logits[0, 2, vocab // 2 :] = torch.nan, -torch.inf, torch.nan
    assert torch.equal(first_of_the_largest(logits), logits.argmax(-1))
