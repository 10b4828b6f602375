"""Bad input is a `ValueError` that names the argument and says what to do, before any forward pass."""

import pytest
import torch
from transformers import TextStreamer

from dllm_hf import DiffusionGenerationConfig, LLaDAConfig

from ..builders import END, MASK, POSITIONS, VOCAB, RefusesToRun, ScriptedModel, generators, left_pad, refused, script

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def model():
    """Fails the test if it is asked for logits."""
    return RefusesToRun(script([1] * POSITIONS))


@pytest.mark.parametrize(
    "option, remedy",
    [
        ({"blok_length": 4}, "block_length"),
        ({"temprature": 1.0}, "temperature"),
        ({"block_size": 4}, "block_length"),
        ({"num_beams": 2}, "remasking_strategy"),
        ({"cache_implementation": "static"}, "cache_policy"),
        ({"min_new_tokens": 3}, "suppress_tokens"),
        ({"max_denoising_steps": 3}, "denoising_steps"),
        ({"frobnicate": 1}, "options are"),
    ],
    ids=str,
)
def test_an_unknown_option_comes_with_the_one_that_was_meant(model, option, remedy):
    refused(model, f"`{next(iter(option))}`", remedy, **option)


@pytest.mark.parametrize("name", ["remasking_strategy", "remasking", "alg"])
@pytest.mark.parametrize("strategy", ["low_confidance", "default", "topk", 3])
def test_an_unknown_strategy_comes_with_the_known_ones(model, name, strategy):
    refused(model, "`remasking_strategy", "low_confidence_static", "maskgit_plus", **{name: strategy})


def test_steps_of_the_completion_and_steps_of_a_block_exclude_each_other(model):
    refused(model, "`steps=4`", "`denoising_steps=2`", "one of them", steps=4, denoising_steps=2)
    with pytest.raises(ValueError, match="`steps=4`"):
        DiffusionGenerationConfig(steps=4, denoising_steps=2)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.1, NAN, INFINITY, "0.5", True])
@pytest.mark.parametrize("name", ["confidence_threshold", "threshold", "dynamic_threshold", "top_p"])
def test_thresholds_are_above_0_and_at_most_1(model, name, value):
    refused(model, "confidence_threshold|top_p", "above 0", **{name: value})


WRONG_NUMBERS = {
    "max_new_tokens": [-1, 2.5, True, "4", NAN],
    "max_length": [0, -1, 4.0, True],
    "block_length": [0, -4, 4.0, True, NAN],
    "steps": [0, -1, 2.0, True],
    "denoising_steps": [0, 2.0],
    "num_return_sequences": [0, 1.0, True],
    "temperature": [-1.0, NAN, INFINITY, True, "hot"],
    "cfg_scale": [-0.5, NAN, INFINITY, True],
    "alg_temp": [-0.5, NAN, True],
    "entropy_bound": [0, -1.0, NAN],
    "factor": [0, -1.0, INFINITY],
    "eps": [0, 1, NAN],
    "top_k": [-1, 2.0, True],
    "do_sample": [1, "yes"],
    "output_history": [1],
    "suppress_tokens": [-1, [True], [1.0], "5"],
    "eos_token_id": [-1, [END, 1.5], True],
    "pad_token_id": [-1, True, [1]],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_NUMBERS.items() for value in values])
def test_an_impossible_value_is_refused_by_name(model, name, value):
    refused(model, f"`{name}`", **{name: value})


@pytest.mark.parametrize("option", ["suppress_tokens", "confidence_suppress_tokens", "eos_token_id", "pad_token_id"])
def test_a_special_token_outside_the_vocabulary_is_refused_by_name(model, option):
    refused(model, f"`{option}`", "vocabulary", **{option: VOCAB})


@pytest.mark.parametrize("options", [{}, {"logits_eos_inf": True}, {"bad_words_ids": [[END]]}], ids=str)
def test_a_token_must_be_left_to_propose(model, options):
    left_out = {MASK} if not options else {MASK, END}
    every = [token for token in range(VOCAB) if token not in left_out]
    refused(model, "`suppress_tokens`", "none is left", suppress_tokens=every, **options)


def test_an_empty_prompt_needs_new_tokens(model):
    refused(
        model, "`max_new_tokens=0`", "empty prompt", input_ids=torch.zeros(1, 0, dtype=torch.long), max_new_tokens=0
    )


def test_a_prompt_of_padding_alone_is_an_empty_prompt(model):
    empty = {"input_ids": torch.tensor([[END, END]]), "attention_mask": torch.zeros(1, 2, dtype=torch.long)}
    refused(model, "`max_new_tokens=0`", **empty, max_new_tokens=0)


@pytest.mark.parametrize(
    "mask, mention",
    [
        (torch.tensor([[1, 1, 0]]), "right-padded"),
        (torch.tensor([[1, 0, 1]]), "holes"),
        (torch.tensor([[0, 1, 0]]), "right-padded"),
        (torch.tensor([1, 1, 1]), "shape"),
        (torch.ones(1, 1, 3, 3), "shape"),
        (torch.ones(1, 4), "shape"),
        (torch.ones(2, 3), "shape"),
        ([[1, 1, 1]], "shape|tensor"),
        (torch.tensor([[1, 2, 1]]), "0 .* 1"),
        (torch.tensor([[0.5, 1.0, 1.0]]), "0 .* 1"),
        (torch.tensor([[-INFINITY, 0.0, 0.0]]), "0 .* 1"),
    ],
    ids=lambda value: str(value).replace("\n", ""),
)
def test_an_attention_mask_is_2d_and_padded_on_the_left(model, mask, mention):
    refused(model, "`attention_mask`", mention, attention_mask=mask)


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([5, 6, 7]), torch.zeros(1, 1, 3).long(), torch.ones(1, 3), [[5, 6, 7]], torch.zeros(0, 3).long()],
    ids=["1-D", "3-D", "float", "list", "no rows"],
)
def test_input_ids_are_a_2d_tensor_of_token_ids(model, ids):
    refused(model, "`input_ids`", input_ids=ids)


@pytest.mark.parametrize("token", [-1, -100, VOCAB, 2**40])
def test_token_ids_are_in_the_vocabulary(model, token):
    refused(model, "`input_ids`", str(token), f"{VOCAB} tokens", input_ids=torch.tensor([[5, token]]))


def test_the_prompt_is_given_once(model):
    ids = torch.tensor([[5]])
    refused(model, "`input_ids`", inputs=ids, input_ids=ids)
    refused(model, "`input_ids`", input_ids=None)


@pytest.mark.parametrize("policy", ["block", "fast"])
def test_a_cache_policy_that_the_model_cannot_have_comes_with_those_that_it_can(model, policy):
    refused(model, f"`cache_policy='{policy}'`", "none, prefix, dual", cache_policy=policy)


def test_a_model_without_a_mask_token_says_what_to_set():
    refused(RefusesToRun(script([1]), mask_token_id=None), "`mask_token_id`", "pass it")


def test_the_mask_cannot_end_a_sequence(model):
    refused(model, "`mask_token_id", "eos_token_id", eos_token_id=MASK)


def test_max_length_is_not_shorter_than_the_prompt(model):
    refused(model, "`max_length=2`", "`max_new_tokens`", max_length=2, max_new_tokens=None)


@pytest.mark.parametrize("number", [POSITIONS - 2, 2**40])
def test_the_canvas_fits_the_positions_of_the_model(model, number):
    refused(model, f"{POSITIONS} positions", "`max_new_tokens", max_new_tokens=number)


def test_padding_takes_no_position_of_the_model():
    model = ScriptedModel(script([1] * POSITIONS))
    inputs = {"input_ids": torch.full((1, POSITIONS), END), "attention_mask": torch.zeros(1, POSITIONS).long()}
    assert model.diffusion_generate(**inputs, max_new_tokens=4).shape == (1, POSITIONS + 4)


def test_a_streamer_follows_one_sequence(model, tokenizer):
    refused(model, "`streamer`", "2", streamer=TextStreamer(tokenizer), **left_pad([[5], [6, 7]]))
    refused(model, "`streamer`", streamer=TextStreamer(tokenizer), num_return_sequences=2)


def test_there_is_a_generator_for_each_row_or_one_for_all(model):
    refused(model, "`generator`", "2 generators for 1 rows", generator=generators([0, 1]))
    refused(model, "`generator`", "1 generators for 2 rows", generator=generators([0]), num_return_sequences=2)


@pytest.mark.parametrize("generator", [0, "seed", [0]], ids=str)
def test_a_seed_is_no_generator(model, generator):
    refused(model, "`generator`", "torch.Generator", generator=generator, temperature=1.0)


@pytest.mark.parametrize("switch", ["logits_eos_inf", "confidence_eos_eot_inf"])
def test_the_switches_of_llada_need_an_end_of_sequence_token(switch):
    refused(RefusesToRun(script([1]), eos_token_id=None), f"`{switch}=True`", "`eos_token_id`", **{switch: True})


def test_a_llada_moe_configuration_is_refused():
    for keys in ({"architectures": ["LLaDAMoEModelLM"]}, {"num_experts": 64}, {"expert_intermediate_size": 1024}):
        with pytest.raises(ValueError, match="LLaDA-MoE"):
            LLaDAConfig(**keys)


def test_a_prompt_that_is_too_long_by_itself_is_to_be_shortened(model):
    refused(model, "no room for new tokens", "shorten the prompt", input_ids=torch.ones(1, POSITIONS, dtype=torch.long))
