"""OpenAI's own client against the server, over HTTP."""

import pytest

from dllm_hf import SamplingParams

from ..builders import VOCAB
from .served import NAME, ROOM, serving, tiny_llm

openai = pytest.importorskip("openai")

MORE = {"extra_body": {"block_length": 4}}
MESSAGES = [{"role": "user", "content": "abc"}]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def alone(server, prompt, **params) -> str:
    """What the engine gives a prompt by itself."""
    [output] = server.llm.generate([prompt], SamplingParams(**{**ROOM, **params}), use_tqdm=False)
    return output.outputs[0].text


def test_a_chat_gets_what_the_engine_gives_its_prompt(client, server):
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=8, **MORE)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == alone(server, "abc:")
    assert choice.finish_reason in ("stop", "length")
    assert (answer.usage.prompt_tokens, answer.model) == (4, NAME)
    assert answer.usage.diffusion["denoising_steps"] > 0 and answer.usage.diffusion["tokens_per_forward"] > 0
    assert answer.diffusion["block_length"] == 4 and answer.diffusion["cache_policy"] == "none"


def test_an_answer_names_the_type_of_keys_and_values():
    with serving(tiny_llm(cache_policy="dual", cache_dtype="int8")) as running:
        options = running.complete([5, 6, 7], max_tokens=4).json["diffusion"]
    assert (options["cache_policy"], options["cache_dtype"]) == ("dual", "int8")


def test_roles_and_content_parts_are_text_for_the_template(client):
    turns = [
        {"role": "developer", "content": "de"},
        {"role": "user", "content": [{"type": "text", "text": "f"}, {"type": "text", "text": "g"}]},
    ]
    joined = [{"role": "system", "content": "de"}, {"role": "user", "content": "fg"}]
    first, second = (
        client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=8, **MORE)
        for messages in (turns, joined)
    )
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.prompt_tokens == 6


def test_prompts_are_strings_token_ids_or_lists_of_either(client, server):
    def texts(prompt):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=8, **MORE)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    first, second = alone(server, "abc"), alone(server, "de")
    assert texts("abc") == texts([0, 1, 2]) == [first]
    assert texts(["abc", "de"]) == texts([[0, 1, 2], [3, 4]]) == [first, second]


def test_n_completions_are_those_of_following_seeds(client, server):
    answer = client.completions.create(
        model=NAME, prompt=["abc", "de"], n=2, seed=5, temperature=1.0, max_tokens=8, **MORE
    )
    wanted = [alone(server, prompt, seed=seed, temperature=1.0) for prompt in ("abc", "de") for seed in (5, 6)]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage.prompt_tokens == 5  # each prompt once


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage(client, server):
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, **MORE
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[0].choices[0].delta.content
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == alone(server, "abc:", max_tokens=12)
    reasons = [each.choices[0].finish_reason for each in chunks[:-1]]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == 4
    assert len({each.id for each in chunks}) == 1


def test_the_streams_of_several_completions_are_told_apart_by_their_index(client):
    options = {"model": NAME, "prompt": ["abc", "de"], "n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 12, **MORE}
    texts = [""] * 4
    for chunk in client.completions.create(stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in client.completions.create(**options).choices]


def test_drafts_come_in_chunks_that_the_client_takes_for_empty(client, server):
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=8, stream=True,
        extra_body={"block_length": 4, "stream_drafts": True},
    )  # fmt: skip
    chunks = list(stream)
    drafts = [each.draft["tokens"] for each in chunks if getattr(each, "draft", None)]
    assert len(drafts) > 2 and drafts[0].count(None) > drafts[-2].count(None) and None not in drafts[-1]
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == alone(server, "abc:")


def test_a_text_ends_before_a_stop_string(client, server):
    whole = alone(server, "abc", ignore_eos=True, max_tokens=12)
    answer = client.completions.create(
        model=NAME, prompt="abc", max_tokens=12, stop=[whole[5:7], "nowhere"],
        extra_body={"block_length": 4, "ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].text == whole[: whole.index(whole[5:7])]
    assert answer.choices[0].finish_reason == "stop"


def test_echo_puts_the_prompt_before_the_text(client, server):
    answer = client.completions.create(model=NAME, prompt=["abc"], echo=True, max_tokens=8, **MORE)
    assert answer.choices[0].text == "abc" + alone(server, "abc")
    stream = client.completions.create(model=NAME, prompt=[0, 1, 2], echo=True, max_tokens=8, stream=True, **MORE)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_without_a_length_the_text_fills_what_room_there_is(client):
    answer = client.completions.create(model=NAME, prompt="a" * 120, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 128


def of_engine(server, prompt: str, top: int) -> tuple[list[int], list[dict]]:
    params = SamplingParams(**ROOM, logprobs=top)
    [output] = server.llm.generate([prompt], params, use_tqdm=False)
    return output.outputs[0].token_ids, output.outputs[0].logprobs


def test_a_chat_tells_log_probabilities_whole_and_streamed(client, server):
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 8, "logprobs": True, "top_logprobs": 3, **MORE}
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    streamed = []
    for chunk in client.chat.completions.create(stream=True, **options):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == content
    tokens, logprobs = of_engine(server, "abc:", 3)
    assert [each.token for each in content] == [server.llm.tokenizer.decode([token]) for token in tokens]
    assert [bytes(each.bytes).decode() for each in content] == [each.token for each in content]
    assert [each.logprob for each in content] == [of[token].logprob for token, of in zip(tokens, logprobs)]
    for each, of in zip(content, logprobs):
        assert [top.logprob for top in each.top_logprobs] == sorted([one.logprob for one in of.values() if one.rank])[
            ::-1
        ]
    options["top_logprobs"] = None
    assert all(
        each.top_logprobs == [] for each in client.chat.completions.create(**options).choices[0].logprobs.content
    )


@pytest.mark.parametrize("top", [0, 2])
def test_a_completion_tells_log_probabilities_whole_and_streamed(client, server, top):
    options = {"model": NAME, "prompt": ["abc", "de"], "max_tokens": 8, "logprobs": top, **MORE}
    streamed = [{"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in "12"]
    choices = client.completions.create(**options).choices
    for chunk in client.completions.create(stream=True, **options):
        for name, values in chunk.choices[0].logprobs or {}:
            streamed[chunk.choices[0].index][name] += values
    for prompt, choice, chunks in zip(("abc", "de"), choices, streamed):
        tokens, logprobs = of_engine(server, prompt, top)
        found = choice.logprobs
        # The size of a batch decides how sums are rounded.
        wanted = pytest.approx([of[token].logprob for token, of in zip(tokens, logprobs)], abs=1e-5)
        assert found.token_logprobs == wanted and chunks["token_logprobs"] == wanted
        assert (chunks["tokens"], chunks["text_offset"]) == (found.tokens, found.text_offset)
        assert [list(each) for each in chunks["top_logprobs"]] == [list(each) for each in found.top_logprobs]
        assert found.text_offset == [sum(map(len, found.tokens[:index])) for index in range(len(tokens))]
        for token, best in zip(found.tokens, found.top_logprobs):
            assert token in best and top <= len(best) <= top + 1 and (top or list(best) == [token])


def test_the_log_probabilities_of_a_prompt_are_refused(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt="a", logprobs=0, echo=True)
    assert error.value.param == "logprobs" and "bound" in str(error.value)


def test_tools_are_refused_by_name(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=[tool])
    assert error.value.param == "tools"
    text = {"type": "text"}
    client.chat.completions.create(model=NAME, messages=MESSAGES, response_format=text, tools=[], max_tokens=1)


def test_errors_are_those_of_the_client(client, server):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="a")
    assert error.value.param == "model" and error.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model=NAME, prompt="a", max_tokens=10**9)
    assert (error.value.status_code, error.value.param) == (413, "max_tokens")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=[VOCAB])
    assert error.value.param == "prompt"


def test_models_are_listed_and_described(client):
    [model] = client.models.list().data
    assert model.id == NAME and model.max_model_len == 128
    assert client.models.retrieve(NAME).diffusion["mask"] == "<mask>"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_timeout_ends_a_text_with_what_is_final(client):
    answer = client.completions.create(
        model=NAME, prompt="abc", max_tokens=120, extra_body={"timeout": 0.001, "ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "timeout"
    assert answer.usage.completion_tokens < 120


def test_a_client_that_stops_waiting_frees_its_row(server):
    impatient = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model=NAME, prompt="abc", max_tokens=120, n=8, extra_body={"ignore_eos": True})
    assert server.becomes_idle()


def test_a_full_queue_asks_for_patience():
    with serving(tiny_llm(max_num_seqs=1, max_queue=1)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        streams = [
            client.completions.create(
                model=NAME, prompt="abc", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
            )
        ]
        next(iter(streams[0]))  # it has the slot
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(
                model=NAME, prompt=["a", "b", "c"], max_tokens=100, extra_body={"ignore_eos": True}
            )
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert error.value.code == "queue_full"
        streams[0].close()
        assert server.becomes_idle()
