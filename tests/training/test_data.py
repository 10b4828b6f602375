"""Several texts in a row, and chats of which the answers are learnt."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf.training import DataCollatorForMaskedDiffusion, chat_texts, pack

from ..builders import BUILDERS, MASK, character_tokenizer, new_model

# --- packing


def texts_of(lengths: list[int], prompts: bool = False) -> list[dict[str, list[int]]]:
    """No two have a token in common."""
    texts, start = [], 1
    for length in lengths:
        tokens = list(range(start, start + length))
        texts.append({"input_ids": tokens})
        if prompts:
            texts[-1]["labels"] = [-100] * (length // 2) + tokens[length // 2 :]
        start += length
    return texts


def unpacked(rows: list[dict[str, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """The tokens and labels between one position 0 and the next."""
    texts = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"])
        begins = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(row["input_ids"])]):
            assert row["position_ids"][begin:end] == list(range(end - begin))
            texts.append((row["input_ids"][begin:end], row["labels"][begin:end]))
    return texts


@given(lengths=st.lists(st.integers(0, 12), max_size=20), length=st.integers(12, 30), prompts=st.booleans())
def test_rows_hold_every_text_once_and_whole_and_are_not_too_long(lengths, length, prompts):
    texts = texts_of(lengths, prompts)
    rows = pack(texts, length)
    assert all(0 < len(row["input_ids"]) <= length for row in rows)
    expected = [(text["input_ids"], text.get("labels", text["input_ids"])) for text in texts if text["input_ids"]]
    assert sorted(unpacked(rows)) == sorted(expected)


@given(lengths=st.lists(st.integers(1, 12), max_size=20), length=st.integers(12, 30))
def test_no_two_rows_would_fit_into_one(lengths, length):
    used = sorted(len(row["input_ids"]) for row in pack(texts_of(lengths), length))
    assert len(used) <= len(lengths)
    assert len(used) < 2 or used[0] + used[1] > length


def test_a_text_goes_where_the_least_room_is_left():
    rows = pack(texts_of([7, 5, 3, 2]), 10)
    assert sorted(sorted(len(text) for text, _ in unpacked([row])) for row in rows) == [[2, 5], [3, 7]]


def test_packing_leaves_its_texts_as_they_are():
    texts = texts_of([3, 2], prompts=True)
    pack(texts, 5)
    assert texts == texts_of([3, 2], prompts=True)


def test_any_iterable_of_texts_is_packed_and_none_gives_no_rows():
    assert pack(iter(texts_of([3, 2])), 5) == pack(texts_of([3, 2]), 5)
    assert pack([], 5) == []


def test_tensors_are_packed_like_lists():
    texts = texts_of([4, 3], prompts=True)
    tensors = [{name: torch.tensor(values) for name, values in text.items()} for text in texts]
    assert pack(tensors, 8) == pack(texts, 8)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="13 tokens.*`length=12`"):
        pack(texts_of([2, 13]), 12)
    with pytest.raises(ValueError, match="`length=0`"):
        pack([], 0)
    with pytest.raises(ValueError, match="3 `input_ids` and 2 `labels`"):
        pack([{"input_ids": [1, 2, 3], "labels": [1, 2]}], 12)


@pytest.mark.parametrize("family, changes", [*((name, {}) for name in BUILDERS), ("gla_dream", {"logits_shift": 1})])
def test_the_loss_of_packed_texts_and_its_gradients_are_those_of_the_texts(family, changes):
    model = new_model(family, **changes)
    texts = texts_of([11, 6, 9, 14])
    collator = DataCollatorForMaskedDiffusion(character_tokenizer(), seed=0)
    packed = collator(pack(texts, 20))
    assert packed["input_ids"].shape == (2, 20)

    number = (packed["labels"] != -100).sum()
    loss = model(**packed).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = 0
    for row, positions in enumerate(packed["position_ids"]):
        real = packed["attention_mask"][row].bool()
        begins = ((positions == 0) & real).nonzero()[:, 0].tolist()
        for begin, end in zip(begins, [*begins[1:], int(real.sum())]):
            alone = {name: packed[name][row : row + 1, begin:end] for name in ("input_ids", "labels", "mask_ratio")}
            total = total + model(**alone, num_items_in_batch=number).loss
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        torch.testing.assert_close(
            gradient, parameter.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: name + text
        )


# --- chats

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so"},
]


@pytest.fixture
def chatty():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(tokenizer, text) -> tuple[str, str]:
    """What is given and what is learnt."""
    given = sum(label == -100 for label in text["labels"])
    assert text["labels"] == [-100] * given + text["input_ids"][given:]
    return tokenizer.decode(text["input_ids"][:given]), tokenizer.decode(text["input_ids"][given:])


def test_each_answer_of_a_chat_is_a_text_whose_prompt_is_not_learnt(chatty):
    first = "system:be brief\nuser:hello\nassistant:"
    assert [read(chatty, text) for text in chat_texts(CHAT, chatty)] == [
        (first, "hi\n"),
        (first + "hi\nuser:why?\nassistant:", "so\n"),
    ]


def test_questions_after_the_last_answer_are_left_out(chatty):
    assert chat_texts([*CHAT, {"role": "user", "content": "more"}], chatty) == chat_texts(CHAT, chatty)


def test_a_chat_that_begins_with_an_answer_has_no_prompt(chatty):
    assert read(chatty, chat_texts([{"role": "assistant", "content": "hi"}], chatty)[0]) == ("", "assistant:hi\n")


def test_options_reach_the_template(chatty):
    chatty.chat_template = "{{ greeting }}" + TEMPLATE
    given, learnt = read(chatty, chat_texts(CHAT[:3], chatty, greeting="dear: ")[0])
    assert given.startswith("dear: system") and learnt == "hi\n"


def test_a_template_that_rewrites_what_came_before_is_refused(chatty):
    chatty.chat_template = "{% if add_generation_prompt %}a{% else %}b{% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match="message 2.*[Tt]emplate"):
        chat_texts(CHAT, chatty)


def test_a_chat_without_an_answer_is_refused(chatty):
    with pytest.raises(ValueError, match="'assistant'"):
        chat_texts(CHAT[:2], chatty)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match="`tokenizer.chat_template`"):
        chat_texts(CHAT, character_tokenizer())


def test_of_a_chat_only_the_answers_are_masked(chatty):
    texts = chat_texts(CHAT, chatty)
    for seed in range(10):
        batch = DataCollatorForMaskedDiffusion(chatty, seed=seed)(texts)
        for text, noisy in zip(texts, batch["input_ids"].tolist()):
            given = sum(label == -100 for label in text["labels"])
            assert noisy[:given] == text["input_ids"][:given] and MASK not in noisy[len(text["input_ids"]) :]
