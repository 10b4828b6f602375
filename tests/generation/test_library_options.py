"""What scripts of the library pass out of habit, and the options that its processors and criteria do."""

import time

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, GenerationConfig, TextStreamer, pipeline

from dllm_hf import DiffusionGenerationConfig
from dllm_hf.generation.configuration import NEUTRAL

from ..builders import (
    END,
    MASK,
    POSITIONS,
    RefusesToRun,
    ScriptedModel,
    assert_each_row_is_what_it_is_alone,
    generate,
    new_tokens,
    refused,
    script,
    tiny_model,
)

PROMPT = torch.tensor([[5, 6, 7]])
REFUSES = RefusesToRun(script([1] * POSITIONS))


# --- options that ask for nothing


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_option_of_the_library_that_asks_for_nothing_changes_nothing(llada, name):
    expected = llada.diffusion_generate(PROMPT, max_new_tokens=4)
    for value in (NEUTRAL[name], None):
        assert torch.equal(llada.generate(PROMPT, max_new_tokens=4, **{name: value}), expected)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 4},
        {"length_penalty": 0.5},
        {"output_scores": True},
        {"synced_gpus": True},
        {"guidance_scale": 2.0},
        {"min_new_tokens": 1},
        {"no_repeat_ngram_size": 3},
        {"penalty_alpha": 0.6},
        {"forced_eos_token_id": 3},
    ],
    ids=str,
)
def test_one_that_asks_for_something_else_is_refused_by_name(option):
    refused(REFUSES, f"`{next(iter(option))}", **option)


def test_use_cache_false_decodes_without_a_cache_whatever_is_recommended():
    model = tiny_model("sdar")
    assert generate(model, [[1, 2]], use_cache=False, max_new_tokens=4).past_key_values is None
    refused(model, "cache_policy", use_cache=False, cache_policy="block")


def test_a_generation_config_may_be_passed_by_position(llada):
    expected = llada.diffusion_generate(PROMPT, max_new_tokens=5)
    for config in (GenerationConfig(max_new_tokens=5, num_beams=1), DiffusionGenerationConfig(max_new_tokens=5)):
        assert torch.equal(llada.generate(PROMPT, config), expected)


def test_numbers_of_numpy_and_torch_are_numbers(llada):
    plain = {"max_new_tokens": 6, "block_length": 3, "confidence_threshold": 0.5, "top_p": 0.9, "eos_token_id": [3, 4]}
    for kind in (np.array, torch.tensor):
        options = {name: kind(value) for name, value in plain.items()}
        assert torch.equal(llada.diffusion_generate(PROMPT, **options), llada.diffusion_generate(PROMPT, **plain))
    assert DiffusionGenerationConfig(max_new_tokens=np.int64(3), temperature=np.float32(0.5)).temperature == 0.5


@pytest.mark.parametrize("ends", [{END, 5}, (5, END), torch.tensor([5, END]), np.array([5, END]), torch.tensor(5)])
def test_the_ends_of_a_sequence_may_be_a_set_a_tuple_an_array_or_a_tensor(ends):
    model = ScriptedModel(script([1, 5, 3, 4]))
    assert new_tokens(model, [], max_new_tokens=4, block_length=2, eos_token_id=ends, pad_token_id=0) == [1, 5, 0, 0]


def test_what_a_tokenizer_gives_may_be_passed_whole(llada):
    mask = torch.tensor([[0, 1, 1]])
    encoding = BatchEncoding({"input_ids": PROMPT, "attention_mask": mask, "token_type_ids": torch.zeros_like(PROMPT)})
    expected = llada.diffusion_generate(PROMPT, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(llada.generate(encoding, max_new_tokens=4), expected)
    assert torch.equal(llada.generate(**encoding, max_new_tokens=4), expected)
    refused(llada, "token_type_ids", token_type_ids=torch.ones_like(PROMPT))
    refused(llada, "no `input_ids`", inputs={"attention_mask": mask})


# --- stop strings


def saying(tokenizer, text: str, prompt: int = 0) -> ScriptedModel:
    return ScriptedModel(script(tokenizer(text)["input_ids"], prompt=prompt))


@pytest.mark.parametrize("block_length", [1, 3, 4, 32])
@pytest.mark.parametrize("stop", [". ", ["xyz", ". "], ["wo", ". "]])
def test_nothing_stands_behind_the_first_stop_string(tokenizer, stop, block_length):
    model, text = saying(tokenizer, "one. two. six."), "one. "
    options = {"max_new_tokens": 14, "block_length": block_length, "stop_strings": stop, "tokenizer": tokenizer}
    written = new_tokens(model, [], **options)
    assert tokenizer.decode(written[: len(text)]) == text
    assert set(written[len(text) :]) == {END}


def test_a_stop_string_is_looked_for_behind_the_prompt(tokenizer):
    model = saying(tokenizer, "two. six.", prompt=5)
    options = {"max_new_tokens": 9, "block_length": 3, "stop_strings": "e.", "tokenizer": tokenizer}
    prompt = tokenizer("one. ")["input_ids"]
    assert tokenizer.decode(new_tokens(model, prompt, **options)) == "two. six."


def test_a_stop_string_ends_its_row_alone(tokenizer):
    model = saying(tokenizer, "abcdefghijkl")
    options = {"max_new_tokens": 6, "block_length": 2, "stop_strings": ["d"], "tokenizer": tokenizer}
    assert_each_row_is_what_it_is_alone(model, [[], [1, 2, 3, 4]], **options)


def test_the_stream_ends_with_the_stop_string_as_the_output_does(tokenizer, capsys):
    model = saying(tokenizer, "one. two. six.")
    options = {"max_new_tokens": 14, "block_length": 7, "stop_strings": ["."], "tokenizer": tokenizer}
    sequences = generate(model, [[]], streamer=TextStreamer(tokenizer, skip_special_tokens=True), **options).sequences
    assert capsys.readouterr().out.strip() == tokenizer.decode(sequences[0], skip_special_tokens=True) == "one."


def test_the_stop_sequence_of_the_pipeline_stops(tokenizer):
    model = saying(tokenizer, "one. two.", prompt=2)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [result] = answer("a ", max_new_tokens=9, stop_sequence=".", return_full_text=False)
    assert result["generated_text"] == "one."


def test_stop_strings_without_a_tokenizer_are_refused():
    refused(REFUSES, "stop_strings", "tokenizer", stop_strings=["."])


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3])
def test_a_stop_string_is_a_text(tokenizer, stop):
    refused(REFUSES, "stop_strings", stop_strings=stop, tokenizer=tokenizer)


# --- processors and criteria by name


def test_a_repetition_penalty_passes_over_what_stands_on_the_canvas():
    logits = script([7, 7, 7, 7], 4.0)
    logits[:, 8] = 3.0
    assert new_tokens(ScriptedModel(logits), [], max_new_tokens=4, repetition_penalty=1.0) == [7, 7, 7, 7]
    options = {"max_new_tokens": 2, "remasking_strategy": "sequential", "repetition_penalty": 2.0}
    assert new_tokens(ScriptedModel(logits), [], **options) == [7, 8]


def test_a_repetition_penalty_does_not_count_a_rows_padding():
    model = tiny_model("llada")
    options = {"max_new_tokens": 6, "repetition_penalty": 1.7, "suppress_tokens": []}
    assert_each_row_is_what_it_is_alone(model, [[1, 2, 3, 4, 5], [6], []], **options)


def test_min_p_leaves_the_tokens_that_are_nearly_as_probable_as_the_best():
    logits = torch.zeros(40, 64)
    logits[:, 7], logits[:, 8], logits[:, 9] = 10.0, 9.5, 4.0
    written = new_tokens(ScriptedModel(logits), [], max_new_tokens=40, temperature=3.0, min_p=0.5)
    assert set(written) == {7, 8}


def test_a_bad_word_is_never_written():
    model = ScriptedModel(script([7, 8, 9]))
    assert not {7, 9} & set(new_tokens(model, [], max_new_tokens=3, bad_words_ids=[[7], [9]]))


@pytest.mark.parametrize("words", [[[7, 8]], [7], [[]], "no", [["a"]]], ids=str)
def test_a_bad_word_of_several_tokens_is_refused_with_the_reason(words):
    refused(REFUSES, "bad_words_ids", "one token", bad_words_ids=words)


def test_a_row_ends_with_the_block_in_which_its_time_is_up():
    class Slow(ScriptedModel):
        def forward(self, **kwargs):
            time.sleep(0.05)
            return super().forward(**kwargs)

    model = Slow(script([1] * 40))
    written = new_tokens(model, [], max_new_tokens=40, block_length=2, max_time=0.12, pad_token_id=0)
    assert 2 <= written.count(1) <= 6 and written.count(1) % 2 == 0


@pytest.mark.parametrize("option", [{"max_time": 0}, {"min_p": 1.5}, {"repetition_penalty": -1.0}, {"steps": 10**9}])
def test_impossible_values_of_them_are_refused(option):
    refused(REFUSES, next(iter(option)), **option)


def test_what_cannot_fit_into_memory_is_refused_before_it_is_made():
    refused(REFUSES, "num_return_sequences", num_return_sequences=10**9)
    refused(tiny_model("sdar"), "block_length", block_length=10**12)


# --- one row of several has nothing to fill


def test_an_empty_row_beside_others_has_nothing_to_fill(model, policy):
    output = generate(model, [[1, MASK, 3], []], max_new_tokens=0, cache_policy=policy)
    alone = generate(model, [[1, MASK, 3]], max_new_tokens=0, cache_policy=policy)
    assert output.sequences[0].tolist() == alone.sequences[0].tolist()
    assert MASK not in output.sequences[0]
