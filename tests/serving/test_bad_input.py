"""What cannot be served is refused at once, with the parameter's name; nobody else notices."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from dllm_hf import LLM, DiffusionGenerationConfig
from dllm_hf.serving import Settings
from dllm_hf.serving.app import create_app

from ..builders import MASK, VOCAB, new_model
from .served import NAME

A = {"prompt": "a"}
HI = [{"role": "user", "content": "a"}]
COMPLETIONS = [
    # body, status, parameter
    ({}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [1, 2, "a"]}, 400, "prompt[2]"),
    ({"prompt": [[1], [2.5]]}, 400, "prompt[1][0]"),
    ({"prompt": [True]}, 400, "prompt[0]"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [VOCAB]}, 400, "prompt"),
    ({"prompt": [10**30]}, 400, "prompt"),
    ({"prompt": [MASK]}, 400, "prompt"),
    ({"prompt": "a<mask>b"}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"prompt": "a" * 100_000}, 413, "prompt"),
    ({"prompt": "a" * 128}, 413, "prompt"),
    ({"prompt": "a" * 120, "max_tokens": 9}, 413, "max_tokens"),
    ({"prompt": [0] * 200_000}, 413, "prompt"),
    ({"prompt": "", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": ["a"] * 100, "n": 2}, 400, "n"),
    ({"prompt": ["a"] * 200}, 400, "prompt"),
    ({**A, "max_tokens": 10**9}, 413, "max_tokens"),
    ({**A, "max_tokens": -1}, 400, "max_tokens"),
    ({**A, "max_tokens": "5"}, 400, "max_tokens"),
    ({**A, "max_tokens": 1.5}, 400, "max_tokens"),
    ({**A, "max_tokens": 5, "max_new_tokens": 6}, 400, "max_tokens"),
    ({**A, "n": 0}, 400, "n"),
    ({**A, "n": 10**9}, 400, "n"),
    ({**A, "n": True}, 400, "n"),
    ({**A, "best_of": 2}, 400, "best_of"),
    ({**A, "seed": -1}, 400, "seed"),
    ({**A, "seed": 2**70}, 400, "seed"),
    ({**A, "temperature": -0.5}, 400, "temperature"),
    ({**A, "temperature": float("nan")}, 400, "temperature"),
    ({**A, "temperature": float("inf")}, 400, "temperature"),
    ({**A, "temperature": [1]}, 400, "temperature"),
    ({**A, "top_p": 0}, 400, "top_p"),
    ({**A, "top_k": -2}, 400, "top_k"),
    ({**A, "min_p": 2}, 400, "min_p"),
    ({**A, "stop": ""}, 400, "stop"),
    ({**A, "stop": ["a", ""]}, 400, "stop[1]"),
    ({**A, "stop": ["a"] * 17}, 400, "stop"),
    ({**A, "stop": "a" * 501}, 400, "stop"),
    ({**A, "stop_token_ids": ["a"]}, 400, "stop_token_ids[0]"),
    ({**A, "stop_token_ids": [VOCAB]}, 400, "stop_token_ids"),
    ({**A, "stop_token_ids": [MASK]}, 400, "stop_token_ids"),
    ({**A, "timeout": 0}, 400, "timeout"),
    ({**A, "timeout": float("nan")}, 400, "timeout"),
    ({**A, "stream": "yes"}, 400, "stream"),
    ({**A, "stream_options": []}, 400, "stream_options"),
    ({**A, "block_length": 0}, 400, "block_length"),
    ({**A, "block_length": 10**9}, 400, "block_length"),
    ({**A, "steps": 10**6}, 400, "steps"),
    ({**A, "steps": 4, "denoising_steps": 4}, 400, "steps"),
    ({**A, "remasking_strategy": "best"}, 400, "remasking_strategy"),
    ({**A, "alg": "best"}, 400, "alg"),
    ({**A, "threshold": 2}, 400, "threshold"),
    ({**A, "alg_temp": "warm"}, 400, "alg_temp"),
    ({**A, "eps": 1e400}, 400, "eps"),
    ({**A, "suppress_tokens": {"a": 1}}, 400, "suppress_tokens"),
    ({**A, "suppress_tokens": [0] * 1000}, 400, "suppress_tokens"),
    ({**A, "suppress_tokens": [token for token in range(VOCAB) if token != MASK]}, 400, "suppress_tokens"),
    ({**A, "eos_token_id": [None]}, 400, "eos_token_id"),
    ({**A, "bad_words_ids": [[1, 2]]}, 400, "bad_words_ids"),
    ({**A, "cache_policy": "dual"}, 400, "cache_policy"),
    ({**A, "mask_token_id": 3}, 400, "mask_token_id"),
    ({**A, "logprobs": 21}, 400, "logprobs"),
    ({**A, "logprobs": True}, 400, "logprobs"),
    ({**A, "prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ({**A, "echo": True, "logprobs": 1}, 400, "logprobs"),
    ({**A, "logit_bias": {"5": 100}}, 400, "logit_bias"),
    ({**A, "suffix": "b"}, 400, "suffix"),
    ({**A, "presence_penalty": 0.5}, 400, "presence_penalty"),
    ({**A, "repetition_penalty": 1.1}, 400, "repetition_penalty"),
    ({**A, "cfg_scale": 1.0}, 400, "cfg_scale"),
    ({**A, "response_format": {"type": "structural_tag"}}, 400, "response_format"),
    ({**A, "response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, 400, "response_format"),
    ({**A, "response_format": "json"}, 400, "response_format"),
    ({**A, "guided_regex": 5}, 400, "guided_regex"),
    ({**A, "guided_choice": []}, 400, "guided_choice"),
    ({**A, "structured_outputs": {"structural_tag": "a"}}, 400, "structured_outputs"),
    ({**A, "structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, "structured_outputs"),
    ({**A, "guided_regex": "a", "guided_json": {}}, 400, "guided_json"),
    ({**A, "guided_regex": "a", "denoising_steps": 2}, 400, "denoising_steps"),
    ({**A, "guided_regex": "a", "stop": "a"}, 400, "stop"),
    ({**A, "model": "other"}, 404, "model"),
    ({**A, "model": 5}, 400, "model"),
]
CHATS = [
    ({}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "a"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "<mask>"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 10**5}]}, 413, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 500}]}, 413, "messages"),
    ({"messages": HI, "max_completion_tokens": 10**9}, 413, "max_completion_tokens"),
    ({"messages": HI, "tools": [{}]}, 400, "tools"),
    ({"messages": HI, "tool_choice": "required"}, 400, "tool_choice"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"messages": HI, "top_logprobs": 2}, 400, "top_logprobs"),
]
OTHERS = [
    ("/v1/infill", {"prompt": "abc"}, 400, "prompt"),
    ("/v1/infill", {"prompt": "a_", "blank": ""}, 400, "blank"),
    ("/v1/infill", {"prompt": "_" * 500, "blank": "_"}, 413, "prompt"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
    ("/detokenize", {"tokens": [VOCAB]}, 400, "tokens"),
    ("/detokenize", {"tokens": "a"}, 400, "tokens"),
]
CASES = [("/v1/completions", *case) for case in COMPLETIONS] + [("/v1/chat/completions", *case) for case in CHATS]
BODIES = [
    b"",
    b"[]",
    b"5",
    b"null",
    b"{",
    b'{"prompt": "\xff"}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"{}x",
]


@pytest.mark.parametrize("path, body, status, param", [*CASES, *OTHERS], ids=lambda value: str(value)[:50])
def test_wrong_parameters_are_named(server, path, body, status, param):
    reply = min((server.post(path, body) for _ in range(3)), key=lambda each: each.seconds)
    assert (reply.status, reply.error["param"]) == (status, param), reply.body
    assert reply.error["message"] and len(reply.body) < 1500
    assert reply.seconds < 0.1


@pytest.mark.parametrize("body", BODIES, ids=lambda value: repr(value)[:30])
def test_what_is_no_json_object_is_refused(server, body):
    reply = min((server.post("/v1/completions", body) for _ in range(3)), key=lambda each: each.seconds)
    assert (reply.status, reply.error["param"]) == (400, "body")
    assert reply.seconds < 0.1


def test_a_body_must_say_that_it_is_json(server):
    """A form of another site, which a browser sends without asking, does not."""
    reply = server.call("POST", "/v1/completions", json.dumps(A).encode(), {"Content-Type": "text/plain"})
    assert (reply.status, reply.error["param"]) == (400, "body")


@pytest.mark.parametrize("is_told", [True, False])
def test_a_huge_body_is_refused_without_being_kept(server, is_told):
    size = 16 * 2**20
    body = b'{"prompt": "' + b"a" * size + b'"}'
    headers = {"Content-Type": "application/json"}
    sent = body if is_told else (body[begin : begin + 2**20] for begin in range(0, len(body), 2**20))
    reply = server.call("POST", "/v1/completions", sent, headers)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (413, "body", "body_too_large")
    assert reply.seconds < 0.5


def test_unknown_paths_and_methods_have_the_same_errors(server):
    assert server.get("/v1/nothing").status == 404 and server.get("/v1/nothing").error["code"] == "not_found"
    assert server.get("/v1/completions").status == 405 and server.get("/v1/completions").error


def test_nulls_and_neutral_values_ask_for_nothing(server):
    neutral = {
        "logprobs": None, "logit_bias": {}, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "best_of": 1, "response_format": {"type": "text"}, "min_tokens": 0, "stop": None,
        "temperature": None, "top_k": -1, "user": "somebody", "stream": False, "max_tokens": 4,
    }  # fmt: skip
    assert server.complete("abc", **neutral).json["choices"] == server.complete("abc", max_tokens=4).json["choices"]


def test_unknown_parameters_are_passed_over_with_a_line_in_the_log(server, caplog):
    assert server.complete("abc", max_tokens=4, model=NAME, colour="blue", deep={"a": [1]}).status == 200
    assert "colour, deep" in caplog.text.replace("'", "") and "blue" not in caplog.text


def test_refusals_disturb_nobody(server):
    body = {"prompt": "abc", "max_tokens": 100, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    quiet = server.complete(**body).json["choices"]
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(server.complete, **body)
        refused = 0
        while not disturbed.done():
            path, wrong, status, _ = CASES[refused % len(CASES)]
            assert server.post(path, wrong).status == status
            refused += 1
    assert refused > 5
    assert disturbed.result().json["choices"] == quiet


def test_options_of_the_model_that_no_request_could_have_are_refused_before_anything_listens():
    model = new_model("llada")
    model.generation_config = DiffusionGenerationConfig(repetition_penalty=1.2)
    llm = LLM(model, num_cache_tokens=99)
    with pytest.raises(ValueError, match="`repetition_penalty=1.2`"):
        create_app(llm, Settings(NAME))
