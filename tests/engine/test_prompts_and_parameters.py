"""`LLM` and `SamplingParams`: what is a prompt, what is refused, and when."""

import numpy
import pytest
import torch

from dllm_hf import LLM, DiffusionGenerationConfig, SamplingParams
from dllm_hf.engine import StructuredOutputsParams

from ..builders import tiny_model

ROOM = {"max_tokens": 8, "block_length": 4}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 0}, "`n` must be an integer of at least 1"),
        ({"seed": -1}, "`seed` must be an integer"),
        ({"timeout": 0}, "`timeout` must be a number of seconds above 0"),
        ({"timeout": True}, "`timeout` must be a number of seconds above 0"),
        ({"timeout": 10**400}, "`timeout` must be a number of seconds above 0"),
        ({"stop": ""}, "`stop` must be a string or a list of strings"),
        ({"stop": 5}, "`stop` must be a string or a list of strings"),
        ({"stop_token_ids": 5}, "`stop_token_ids` must be a list of token ids"),
        ({"ignore_eos": "no"}, "`ignore_eos` must be True or False"),
        ({"skip_special_tokens": "no"}, "`skip_special_tokens` must be True or False"),
        ({"options": {1: 2}}, "`options` must be a dict of options by their names"),
        ({"options": {"mask_id": 5}}, "`mask_token_id` is no option of a request"),
        ({"options": {"use_cache": False}}, "`cache_policy` is no option of a request"),
        ({"options": {"cfg_scale": 1.0}}, "use `diffusion_generate`"),
        ({"options": {"cache_policy": "dual"}}, "pass it to `LLM`"),
        ({"options": {"stop_strings": "a"}}, "the argument is called `stop`"),
        ({"options": {"logprobs": 3}}, "`logprobs` .*an argument of its own"),
    ],
)
def test_wrong_parameters_are_refused_when_they_are_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


@pytest.mark.parametrize(
    "prompts, params, message",
    [
        (["abc", [5, 99]], {}, "prompt 1: .*token id 99"),
        (["abc", 5], {}, "prompt 1: a prompt is a string, a list of token ids, or a list of messages"),
        ([[1, 2, 3.5, 4]], {}, r"the prompt holds 3.5 \(float\), which is no token id"),
        ([1, "a"], {}, r"^the prompt holds 'a' \(str\), which is no token id"),
        ([[5], [5, numpy.int64(6), None]], {}, r"prompt 1: the prompt holds None \(NoneType\), which is no token id"),
        ([[2**70]], {}, "the prompt holds the token id 1180591620717411303424"),
        (["\ud800"], {}, "no text that can be encoded"),
        (["abc"], {"stop_token_ids": [99]}, "`stop_token_ids` holds the token id 99"),
        ({"input_ids": [1, 2]}, {}, "`prompts` must be .*: pass its `input_ids`"),
        ({"role": "user", "content": "a"}, {}, "`prompts` must be .*: pass a list of messages"),
        (5, {}, "`prompts` must be a string"),
        ({1, 2}, {}, "`prompts` must be a string"),
        (torch.tensor([[1, 2]]), {}, r"`.tolist\(\)` makes a list"),
        (["abc"], {"options": {"suppress_tokens": list(range(64))}}, "`suppress_tokens`.*none is left"),
        (["abc"], {"logprobs": 21}, "`logprobs` must be an integer from 0 to 20"),
        (["abc"], {"max_tokens": 200}, "take 203 columns|longer than the 128 positions"),
        (["abc"], {"remasking_strategy": "lowconfidence"}, "`remasking_strategy='lowconfidence'` is unknown"),
        (["abc"], {"options": {"tempratur": 1}}, "`tempratur` is not an option.*did you mean 'temperature'"),
        (["abc"], {"options": {"self": 1}}, "`self` is not an option"),
        ([[{"role": "user", "content": "a"}]], {}, "no chat template"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, SamplingParams(**{"max_tokens": 8, **params}))
    assert llm._driver.engine.is_idle and llm._driver.engine.num_forward_passes == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tensor_parallel_size": 2}, "each process reads the weights"),
        ({"max_num_seqs": 0}, "`max_num_seqs` must be an integer of at least 1"),
        ({"max_model_len": 1000}, "more than the 128 positions"),
        ({"max_model_len": 1}, "`max_model_len` has no room .* raise it by 1 or more"),
        ({"num_cache_tokens": 1}, "`num_cache_tokens` has no room .* raise it by 3 or more"),
        ({"gpu_memory_utilization": 1.5}, "above 0 and at most 1"),
        ({"gpu_memory_utilization": "x"}, "`gpu_memory_utilization` must be above 0"),
        ({"enforce_eager": "no"}, "`enforce_eager` must be True or False"),
        ({"generation_config": {}}, "`generation_config` must be a `DiffusionGenerationConfig`, but is a dict"),
        ({"generation_config": DiffusionGenerationConfig(steps=2)}, "a loaded LLaDAModelLM: change the model itself"),
        ({"dtype": "bfloat16"}, "`dtype='bfloat16'` is for a `model` that is read from its files"),
        ({"trust_remote_code": True}, "leave `trust_remote_code` out"),
        ({"cache_policy": "block"}, "`cache_policy='block'` is not possible"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny_model("llada"), **arguments)


def test_the_smallest_engine_that_is_not_refused_decodes_a_token():
    llm = LLM(tiny_model("llada"), max_model_len=2, num_cache_tokens=4)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1


def test_blocks_that_no_request_has_room_for_are_refused_with_the_engine():
    with pytest.raises(ValueError, match="`block_length=256` is more than the 128 positions"):
        LLM(tiny_model("sdar"), block_length=256)


def test_parameters_that_prompts_share_are_checked_once(llm, monkeypatch):
    resolve, calls = llm.model.resolve_options, []
    monkeypatch.setattr(llm.model, "resolve_options", lambda *args: calls.append(args) or resolve(*args))
    params = [SamplingParams(**ROOM), SamplingParams(**ROOM, seed=3)]
    llm.generate(["abc", "de", "a", "b"], [params[0], params[1], params[0], params[1]])
    assert len(calls) == 2


def test_parameters_keep_what_they_were_made_of_whatever_becomes_of_it():
    options, ends, every = {"suppress_tokens": [5]}, [3], []
    for temperature in (0.5, 1.0):
        options["temperature"] = temperature
        every.append(SamplingParams(options=options, stop_token_ids=ends, stop=(stop := ["a"])))
    options["suppress_tokens"].append(6), ends.append(4), stop.append("b")
    assert [each.options for each in every] == [{"suppress_tokens": [5], "temperature": t} for t in (0.5, 1.0)]
    assert every[1].stop_token_ids == [3] and every[1].stop == ["a"]
    form = StructuredOutputsParams(choice=(choice := ["a"]))
    choice.append("b")
    assert form.choice == ["a"]


def test_the_integers_of_an_array_are_token_ids(llm):
    params = SamplingParams(**ROOM, seed=0)
    [expected] = llm.generate([5, 6, 7], params)
    ids = numpy.array([5, 6, 7])
    for prompt in ([*ids], [5, ids[1], torch.tensor(7)], [[*ids]]):
        [output] = llm.generate(prompt, params)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids and output.prompt_token_ids == [5, 6, 7]


def test_an_iterator_of_prompts_is_read_once(llm):
    params = SamplingParams(**ROOM)
    assert [output.prompt for output in llm.generate(map(str, ["abc", "de"]), params)] == ["abc", "de"]


def test_what_a_chat_template_raises_is_said_with_its_prompt(llm):
    llm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="prompt 1: the chat template .*roles must alternate"):
        llm.generate(["a", [{"role": "user", "content": "a"}]], SamplingParams(**ROOM))


def test_a_number_of_best_tokens_that_no_tensor_holds_is_all_of_them(llm):
    params = [SamplingParams(topk=topk, temperature=1.0, seed=1, **ROOM) for topk in (10**30, None)]
    first, second = llm.generate(["abc", "abc"], params)
    assert first.outputs == second.outputs
