"""Structured output over HTTP, by OpenAI's client and under vLLM's names."""

import json

import pytest

from dllm_hf import LLM

from ..builders import tiny_model
from ..engine.test_grammar import BYTES, PERSON, SPECIAL, byte_tokenizer, is_person
from .served import CHAT, NAME, serving

openai = pytest.importorskip("openai")
MESSAGES = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def server():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny_model("dream", vocab_size=BYTES + 40, **SPECIAL)
    with serving(LLM(model, tokenizer=tokenizer, num_cache_tokens=2000, cache_policy="dual")) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chat_follows_its_schema(client, is_streamed):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(2):
        answer = client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=80,
            temperature=1.0,
            seed=seed,
            response_format=form,
            stream=is_streamed,
        )
        if is_streamed:
            chunks = list(answer)
            text, reason = (
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
                chunks[-1].choices[0].finish_reason,
            )
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert reason == "stop" and is_person(text)


def test_vllms_names_are_served(server):
    for name, value, holds in (
        ("guided_json", {"type": "boolean"}, lambda text: text in ("true", "false")),
        ("guided_regex", "[ab]{3}", lambda text: len(text) == 3 and set(text) <= {"a", "b"}),
        ("guided_choice", ["yes", "no"], ["yes", "no"].__contains__),
        ("guided_grammar", 'start: "x" | "yy"', ["x", "yy"].__contains__),
        (
            "structured_outputs",
            {"regex": "c+d", "json": None},
            lambda text: set(text[:-1]) == {"c"} and text[-1] == "d",
        ),
        ("response_format", {"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
    ):
        answer = server.complete("abc", max_tokens=80, block_length=8, **{name: value}).json
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "length" or holds(choice["text"]), name
        assert answer["diffusion"]["remasking_strategy"] == "sequential" and answer["diffusion"]["denoising_steps"] == 8


def test_a_form_that_is_too_complex_is_the_clients_affair(server):
    reply = server.complete("a", max_tokens=20, ignore_eos=True, guided_regex="(a|aa)*" * 2000)
    assert (reply.status, reply.error["code"]) == (400, "form_too_complex")
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    "path, name, value",
    [
        ("/v1/completions", "guided_regex", "a("),
        ("/v1/completions", "guided_json", {"type": "nonsense"}),
        ("/v1/completions", "guided_json", {"$ref": "http://localhost/schema"}),
        ("/v1/completions", "structured_outputs", {"grammar": "start: nothing"}),
        ("/v1/completions", "response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}),
        ("/v1/infill", "guided_regex", "a"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_by_name(server, path, name, value):
    reply = server.post(path, {"prompt": "a<mask>" if "infill" in path else "a", "max_tokens": 8, name: value})
    assert (reply.status, reply.error["param"]) == (400, name), reply.body
