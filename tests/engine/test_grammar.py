"""Completions of a form that is asked for: they have it when they end with the reason "stop"."""

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import StructuredOutputsParams, engine

from ..builders import character_tokenizer, new_model, tiny_model
from ..generation.test_decoder import DEVICE

pytest.importorskip("llguidance", reason='needs a parser: pip install "dllm-hf[grammar]"')

BYTES = 256
SPECIAL = {"mask_token_id": BYTES, "eos_token_id": BYTES + 1, "pad_token_id": BYTES + 1}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def is_person(text: str) -> bool:
    found = json.loads(text)
    is_tag = lambda tag: tag in ("a", "é", None)
    return (
        list(found) == ["name", "age", "tags"] and len(found["name"]) <= 3
        and type(found["age"]) is int and 0 <= found["age"] <= 150
        and len(found["tags"]) <= 2 and all(map(is_tag, found["tags"]))
    )  # fmt: skip


CHOICES = ["yes", "no", "a.b", "né", "- #\n&~\t<x>"]
FORMS = [
    ({"json": PERSON}, is_person),
    (
        {"json": json.dumps({"anyOf": [{"type": "boolean"}, {"const": "🙂"}]})},
        lambda text: json.loads(text) in (True, False, "🙂"),
    ),
    ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ({"regex": r"\d{3}-[é🙂]{2}x*"}, re.compile(r"\d{3}-[é🙂]{2}x*").fullmatch),
    ({"choice": CHOICES}, CHOICES.__contains__),
    (
        {"grammar": 'start: "a" start "b" | "ab"'},
        lambda text: text == "a" * (len(text) // 2) + "b" * (len(text) // 2) != "",
    ),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte: a character may be several."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<mask>", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="<mask>", eos_token="<end>", pad_token="<end>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def llm_of(family: str, **options) -> LLM:
    # Rows of logits that no token of the tokenizer belongs to, as published checkpoints have them.
    model = tiny_model(family, vocab_size=BYTES + 40, **SPECIAL)
    return LLM(model, tokenizer=byte_tokenizer(), **{"num_cache_tokens": 2000, "max_num_seqs": 4, **options})


CELLS = [("llada", "none"), ("llada", "dual"), ("dream", "prefix"), ("sdar", "block"), ("gla_dream", "block")]


@pytest.mark.parametrize("family, policy", CELLS)
@settings(max_examples=2)
@given(data=st.data())
def test_what_ends_with_stop_has_the_form_and_nobody_beside_notices(family, policy, data):
    llm = llm_of(family, cache_policy=policy)
    prompts, params, forms = [], [], data.draw(st.lists(st.sampled_from(FORMS), min_size=2, max_size=4))
    for form, _ in forms:
        prompts.append(data.draw(st.sampled_from(["", "a", "some text"])))
        options = {
            "temperature": data.draw(st.sampled_from([0.0, 1.0, 3.0])),
            "max_tokens": data.draw(st.sampled_from([30, 70])),
        }
        params.append(
            SamplingParams(structured_outputs=StructuredOutputsParams(**form), seed=len(params), n=2, **options)
        )
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=20)
    [alone] = llm.generate(["free"], free, use_tqdm=False)
    outputs = llm.generate([*prompts, "free"], [*params, free], use_tqdm=False)
    assert outputs.pop().outputs[0].token_ids == alone.outputs[0].token_ids
    for output, (form, holds) in zip(outputs, forms):
        for each in output.outputs:
            assert each.finish_reason in ("stop", "length"), each.error
            if each.finish_reason == "stop":
                assert holds(each.text), (form, each.text)
            else:
                assert len(each.token_ids) in (30, 70)
    assert llm._driver.engine.is_idle


def test_graphs_keep_the_form_too(captured, monkeypatch):
    """The tokens that are allowed are data of a graph."""
    monkeypatch.setattr(engine, "are_possible", lambda device: True)
    model = new_model("sdar", vocab_size=BYTES + 40, **SPECIAL).to(DEVICE)
    llm = LLM(model, tokenizer=byte_tokenizer(), num_cache_tokens=2000, max_num_seqs=4)
    params = [
        SamplingParams(structured_outputs=StructuredOutputsParams(**form), temperature=1.0, seed=3, max_tokens=60)
        for form, _ in FORMS
    ]
    for output, (form, holds) in zip(llm.generate([""] * len(FORMS), params, use_tqdm=False), FORMS):
        each = output.outputs[0]
        assert each.finish_reason == "length" or holds(each.text), (form, each.text)
    assert captured


def test_most_end_with_stop():
    """Or the test above would test little."""
    params = [
        SamplingParams(structured_outputs=StructuredOutputsParams(**form), temperature=1.0, seed=3, max_tokens=80)
        for form, _ in FORMS
    ]
    outputs = llm_of("sdar").generate([""] * len(FORMS), params, use_tqdm=False)
    assert sum(output.outputs[0].finish_reason == "stop" for output in outputs) >= 4


def test_log_probabilities_are_those_of_the_model_and_not_of_the_form():
    form = StructuredOutputsParams(choice=["yes"])
    [output] = llm_of("llada").generate(
        "a", SamplingParams(structured_outputs=form, logprobs=20, max_tokens=9), use_tqdm=False
    )
    found = output.outputs[0]
    assert found.text == "yes" and found.finish_reason == "stop"
    assert all(each[token].logprob < 0 for token, each in zip(found.token_ids, found.logprobs))


def test_the_empty_text_is_a_form():
    form = StructuredOutputsParams(regex="")
    [output] = llm_of("llada").generate("a", SamplingParams(structured_outputs=form, ignore_eos=True, max_tokens=9))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "stop")


def test_a_form_that_the_parser_gives_up_on_ends_its_own_completion_alone():
    hard = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a|aa)*" * 2000), max_tokens=20)
    llm, free = llm_of("llada"), SamplingParams(max_tokens=20)
    alone = llm.generate("a", free, use_tqdm=False)[0].outputs[0].token_ids
    failed, other = (output.outputs[0] for output in llm.generate(["a", "a"], [hard, free], use_tqdm=False))
    assert failed.finish_reason == "error" and failed.error.startswith("FormError: the parser of the form gives up")
    assert other.token_ids == alone


def test_a_stop_token_ends_only_what_is_whole_and_does_not_show():
    tokenizer = byte_tokenizer()
    visible = tokenizer("x")["input_ids"]
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(regex="[xy]{4,40}"),
        stop_token_ids=visible,
        temperature=2.0,
        max_tokens=60,
    )
    [output] = llm_of("dream").generate("a", params, use_tqdm=False)
    assert re.fullmatch("y{4,40}", output.outputs[0].text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "need one of json, json_object, regex, choice, grammar"),
        ({"json": "{}", "regex": "a"}, "need one of"),
        ({"choice": []}, "`choice`.*wrong type"),
        ({"regex": 5}, "`regex`.*wrong type"),
    ],
)
def test_a_form_is_one_of_five(arguments, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**arguments)


@pytest.mark.parametrize(
    "form, options, message",
    [
        ({"regex": "a("}, {}, "hold no regex that can be kept"),
        ({"json": {"type": "foo"}}, {}, "hold no json that can be kept"),
        ({"json": {"not": {}}}, {}, "hold no json that can be kept.*not"),
        ({"json": "{"}, {}, "structured_outputs"),
        ({"grammar": "start: undefined"}, {}, "hold no grammar that can be kept"),
        ({"choice": ["\ud800"]}, {}, "hold no regex that can be kept: .*surrogates"),
        ({"regex": "a" * 70_000}, {}, "more than 65536 characters"),
        ({"regex": "a+"}, {"options": {"suppress_tokens": [0, 1, 2, *range(3, 256)]}}, "no token that may be proposed"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_before_anything_runs(form, options, message):
    llm = llm_of("llada")
    with pytest.raises(ValueError, match=message):
        llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(**form), max_tokens=8, **options))
    assert llm._driver.engine.is_idle and llm._driver.engine.num_forward_passes == 0


@pytest.mark.parametrize(
    "options, name",
    [
        ({"stop": "a"}, "stop"),
        ({"denoising_steps": 2}, "denoising_steps"),
        ({"remasking_strategy": "entropy"}, "remasking_strategy"),
        ({"dynamic_threshold": 0.5}, "confidence_threshold"),
    ],
)
def test_other_orders_and_stop_strings_are_refused(options, name):
    with pytest.raises(ValueError, match=f"`{name}`.*leave it out"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), **options)


def test_masks_in_the_prompt_and_tokenizers_without_bytes_are_refused():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), max_tokens=4)
    with pytest.raises(ValueError, match="holds masks"):
        llm_of("llada").generate([[1, BYTES, 2]], params)
    with pytest.raises(ValueError, match="a tokenizer that llguidance reads"):
        LLM(new_model("llada"), tokenizer=character_tokenizer()).generate("a", params)
    with pytest.raises(ValueError, match="no tokenizer"):
        LLM(new_model("llada")).generate([[1]], params)


def test_without_the_parser_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"dllm-hf\[grammar\]"):
        llm_of("llada").generate(
            "a", SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), max_tokens=4)
        )


def test_steps_of_the_models_own_configuration_do_not_count():
    model = new_model("sdar", vocab_size=BYTES + 2, **SPECIAL)
    model.generation_config = model.generation_config.updated(steps=2, remasking_strategy="low_confidence_static")
    llm = LLM(model, tokenizer=byte_tokenizer())
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), max_tokens=8)
    assert llm.generate("a", params, use_tqdm=False)[0].outputs[0].text in ("yes", "no")
