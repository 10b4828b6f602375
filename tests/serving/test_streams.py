"""Streams are exact: the chunks of a completion, one behind the other, are its text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..builders import BUILDERS, END, MASK, TURN_END, ScriptedModel, script
from .served import LLM, NAME, serving, tiny_llm

# Bytes of characters of one to four of them; most texts of these are no UTF-8.
TEXT = "ab é ß € 好 🙂 "
BYTES = sorted(set(TEXT.encode()) | set(range(0x80, 0xA0)))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that a character is several tokens."""
    spelled = {byte: piece for byte, piece in zip(range(256), _spellings())}
    vocabulary = {spelled[byte]: index for index, byte in enumerate(BYTES)}
    vocabulary |= {f"unused{index}": index for index in range(len(BYTES), MASK)}
    vocabulary |= {"<mask>": MASK, "<end>": END, "<turn>": TURN_END, "<unk>": TURN_END + 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="<mask>", eos_token="<end>", pad_token="<end>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _spellings() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    names = {byte: chr(byte) for byte in shown} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def tokens_of(text: str) -> list[int]:
    return [BYTES.index(byte) for byte in text.encode()]


@pytest.fixture(scope="module", params=BUILDERS)
def family_server(request):
    with serving(tiny_llm(request.param, byte_tokenizer())) as server:
        yield server


def both(server, path: str, **body) -> tuple[str, str]:
    """The text in one piece, and that of the stream."""
    whole = server.post(path, {"model": NAME, **body})
    assert whole.status == 200, whole.body
    [choice] = whole.json["choices"]
    streamed = server.post(path, {"model": NAME, "stream": True, **body})
    assert streamed.status == 200
    chunks = [choice for event in streamed.events for choice in event["choices"]]
    assert [each["finish_reason"] for each in chunks if each["finish_reason"]] == [choice["finish_reason"]]
    told = [token for each in chunks for token in spelled(each)]
    assert told == spelled(choice) and len(told) == (
        whole.json["usage"]["completion_tokens"] if "logprobs" in body else 0
    )
    return choice["text"] if "text" in choice else choice["message"]["content"], streamed.text


def spelled(choice) -> list[str]:
    """The tokens whose log-probabilities a choice or a chunk tells."""
    found = choice["logprobs"] or {"tokens": []}
    return found["tokens"] if "tokens" in found else [each["token"] for each in found["content"]]


SEEDED = settings(max_examples=6)


@SEEDED
@given(
    prompt=st.sampled_from(["a", "é 好", "🙂🙂🙂"]),
    seed=st.integers(0, 10**6),
    length=st.integers(1, 40),
    drafts=st.booleans(),
    stop=st.lists(st.sampled_from(["a", "é", " ", "€", "\ufffd", "b ", "\ufffd\ufffd"]), max_size=2),
    chat=st.booleans(),
)
def test_a_stream_is_the_text(family_server, prompt, seed, length, drafts, stop, chat):
    body = {"seed": seed, "temperature": 1.0, "max_tokens": length, "stop": stop, "stream_drafts": drafts}
    body |= {"suppress_tokens": [END]} if seed % 2 else {}
    body |= {"logprobs": True if chat else 1} if seed % 3 else {}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    whole, streamed = both(family_server, "/v1/chat/completions" if chat else "/v1/completions", **body)
    assert whole == streamed
    assert not any(string in whole for string in stop)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_characters_and_stop_strings_across_chunks_come_whole(block):
    text = "ab é好🙂 ß€ ab🙂é ba"
    tokens = tokens_of(text)
    model = ScriptedModel(script(tokens), eos_token_id=END)
    with serving(LLM(model, tokenizer=byte_tokenizer(), num_cache_tokens=500)) as server:
        for stop in ("🙂é", "€ ab🙂", "好🙂", "never"):
            body = {"prompt": "", "max_tokens": len(tokens), "block_length": block, "stop": stop}
            whole, streamed = both(server, "/v1/completions", **body)
            assert whole == streamed == text.partition(stop)[0]
            chunks = server.complete(**body, stream=True).events
            assert not any("\ufffd" in choice["text"] for event in chunks for choice in event["choices"])
            assert stop != "never" or len([each for each in chunks if each["choices"][0]["text"]]) > 1


def test_the_tokens_are_those_of_diffusion_generate(family_server):
    llm = family_server.llm
    prompt, options = tokens_of("é 好"), {"temperature": 1.0, "max_new_tokens": 20}
    policies = llm.model.cache_policies
    cache = "block" if "block" in policies else policies[0]
    output = llm.model.diffusion_generate(
        torch.tensor([prompt]), generator=[torch.Generator().manual_seed(9)], cache_policy=cache, **options
    )
    tokens = output[0, len(prompt) :].tolist()
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    wanted = llm.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    _, streamed = both(family_server, "/v1/completions", prompt=prompt, seed=9, temperature=1.0, max_tokens=20)
    assert streamed == wanted
