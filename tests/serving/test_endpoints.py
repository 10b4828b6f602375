"""The endpoints that are not OpenAI's: infilling, tokens, metrics, health."""

import json
import shutil
import subprocess

import pytest

from dllm_hf import SamplingParams

from ..builders import MASK
from .served import NAME, serving, tiny_llm

curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


def test_masks_are_filled(server):
    reply = server.post("/v1/infill", {"prompt": "ab<mask><mask>c<mask>"})
    [choice] = reply.json["choices"]
    assert [fill["start"] for fill in choice["fills"]] == [2, 5]
    first, second = (fill["text"] for fill in choice["fills"])
    assert choice["text"] == f"ab{first}c{second}"
    [output] = server.llm.generate(["ab<mask><mask>c<mask>"], SamplingParams(max_tokens=0))
    assert choice["text"] == output.outputs[0].filled_prompt
    assert reply.json["usage"]["completion_tokens"] == 0


def test_a_blank_stands_for_a_mask(server):
    spelled = server.post("/v1/infill", {"prompt": "ab<mask><mask>c"}).json["choices"]
    assert server.post("/v1/infill", {"prompt": "ab__c", "blank": "_"}).json["choices"] == spelled
    assert server.post("/v1/infill", {"prompt": [0, 1, MASK, MASK, 2]}).json["choices"] == spelled


def test_text_may_be_added_behind_what_is_filled(server):
    [choice] = server.post("/v1/infill", {"prompt": "ab_c", "blank": "_", "max_tokens": 5}).json["choices"]
    assert len(choice["text"]) > len("ab_c")


def test_a_stream_of_infilling_shows_the_canvas_and_ends_with_the_text(server):
    body = {"prompt": "ab____c", "blank": "_", "block_length": 4, "stream": True, "stream_drafts": True}
    events = server.post("/v1/infill", {**body, "stream_options": {"include_usage": True}}).events
    canvases = [event["draft"]["tokens"] for event in events if "draft" in event]
    assert all(canvas[:2] == ["a", "b"] and canvas[6] == "c" for canvas in canvases)
    masks = [canvas.count(None) for canvas in canvases]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0 and len(masks) > 2
    whole = server.post("/v1/infill", {**body, "stream": False}).json["choices"][0]
    assert events[-2]["choices"][0]["text"] == whole["text"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["diffusion"]["denoising_steps"] > 0


def test_what_was_filled_has_log_probabilities_and_what_was_given_has_none(server):
    body = {"prompt": "ab_c__", "blank": "_", "max_tokens": 3, "logprobs": 2, "ignore_eos": True}
    [choice] = server.post("/v1/infill", body).json["choices"]
    assert ["".join(fill["logprobs"]["tokens"]) for fill in choice["fills"]] == [
        fill["text"] for fill in choice["fills"]
    ]
    assert [len(fill["logprobs"]["token_logprobs"]) for fill in choice["fills"]] == [1, 2]
    assert len(choice["logprobs"]["tokens"]) == 3 and all(value < 0 for value in choice["logprobs"]["token_logprobs"])
    [streamed] = server.post("/v1/infill", {**body, "stream": True}).events[-1]["choices"]
    assert [fill["logprobs"]["tokens"] for fill in streamed["fills"]] == [
        fill["logprobs"]["tokens"] for fill in choice["fills"]
    ]
    [without] = server.post("/v1/infill", {**body, "logprobs": None}).json["choices"]
    assert without["logprobs"] is without["fills"][0]["logprobs"] is None


def test_masks_that_a_timeout_leaves_are_an_error(server):
    reply = server.post("/v1/infill", {"prompt": "_" * 100, "blank": "_", "timeout": 0.001})
    assert (reply.status, reply.error["param"]) == (408, "timeout")


def test_texts_become_tokens_and_tokens_texts(server):
    assert server.post("/tokenize", {"prompt": "abc"}).json == {"tokens": [0, 1, 2], "count": 3, "max_model_len": 128}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "ab"}]})
    assert server.post("/detokenize", {"tokens": chat.json["tokens"]}).json == {"prompt": "ab:"}


def test_metrics_count_under_our_names_and_those_of_vllm():
    with serving(tiny_llm()) as server:
        server.complete("abc", max_tokens=8, ignore_eos=True)
        server.complete("abc", max_tokens=-1)
        lines = dict(
            line.rsplit(" ", 1) for line in server.get("/metrics").body.decode().splitlines() if line[0] != "#"
        )
    labels = f'{{model_name="{NAME}"}}'
    for name in ("dllm_hf_generation_tokens_total", "vllm:generation_tokens_total"):
        assert float(lines[name + labels]) == 8
    for name in ("dllm_hf_prompt_tokens_total", "vllm:prompt_tokens_total"):
        assert float(lines[name + labels]) == 3
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert float(lines[f"vllm:{name}_count{labels}"]) == 1
    assert float(lines["dllm_hf_denoising_steps_total" + labels]) == 8
    assert float(lines["vllm:num_requests_running" + labels]) == float(lines["vllm:kv_cache_usage_perc" + labels]) == 0
    answers = [line for line in lines if line.startswith("dllm_hf_http_responses")]
    assert any('status="400"' in line for line in answers) and any('status="200"' in line for line in answers)


@curl
def test_curl_gets_json_streams_and_refusals(server):
    def run(*arguments: str) -> str:
        command = ["curl", "--silent", "--max-time", "20", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    post = ["-H", "Content-Type: application/json", server.url + "/v1/completions", "-d"]
    body = {"prompt": "abc", "max_tokens": 6}
    whole = json.loads(run(*post, json.dumps(body)))["choices"][0]["text"]
    streamed = run("--no-buffer", *post, json.dumps({**body, "stream": True}))
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert streamed.endswith("data: [DONE]\n\n")
    assert run("--output", "/dev/null", "--write-out", "%{http_code}", *post, "{") == "400"
    assert json.loads(run(server.url + "/version"))["version"]


def test_the_schema_describes_every_endpoint(server):
    schema = server.get("/openapi.json").json
    assert set(schema["paths"]) == {
        "/health", "/metrics", "/version", "/tokenize", "/detokenize", "/v1/models", "/v1/models/{name}",
        "/v1/chat/completions", "/v1/completions", "/v1/infill",
    }  # fmt: skip
    for operations in schema["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"] and "4XX" in operation["responses"]
