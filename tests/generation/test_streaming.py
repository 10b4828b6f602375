"""Streaming: the text that arrives is the decoded sequence."""

from threading import Thread

import pytest
import torch
from transformers import TextDiffusionStreamer, TextIteratorStreamer, TextStreamer

from ..builders import END, MASK, ScriptedModel, generate, new_tokens, script


class Written(TextDiffusionStreamer):
    """Collects what a terminal would show: drafts, and the text that stays."""

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.drafts, self.text, self.ended, self.puts = [], "", False, []

    def put_draft(self, value, **kwargs):
        assert value.device.type == "cpu" and value.dtype == torch.long
        self.drafts.append(self.tokenizer.decode(value))

    def put(self, value):
        self.puts.append(value)
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        self.text, self.ended = self.text + text, self.ended or stream_end


def saying(tokenizer, text, prompt=""):
    tokens = tokenizer(text)["input_ids"]
    return ScriptedModel(script(tokens, prompt=len(prompt))), len(tokens)


def test_the_streamed_text_is_the_decoded_sequence(model, policy, tokenizer):
    streamer = Written(tokenizer)
    options = {"max_new_tokens": 10, "block_length": 4, "cache_policy": policy, "eos_token_id": []}
    output = generate(model, [tokenizer("to be")["input_ids"]], streamer=streamer, **options)
    assert streamer.text == tokenizer.decode(output.sequences[0])
    assert streamer.ended


def test_the_prompt_is_skipped_where_that_is_asked_for(model, policy, tokenizer):
    prompt = tokenizer("to be")["input_ids"]
    for row in (prompt, []):
        streamer = Written(tokenizer, skip_prompt=True)
        written = new_tokens(model, row, max_new_tokens=6, block_length=4, eos_token_id=[], streamer=streamer)
        assert streamer.text == tokenizer.decode(written)


def test_padding_is_not_streamed(tokenizer):
    model, number = saying(tokenizer, "hello")
    inputs = {"input_ids": torch.tensor([[END, END]]), "attention_mask": torch.zeros(1, 2, dtype=torch.long)}
    streamer = Written(tokenizer)
    model.diffusion_generate(**inputs, max_new_tokens=number, block_length=2, streamer=streamer)
    assert streamer.text == "hello"


def test_the_text_ends_with_the_end_of_sequence(tokenizer):
    model, number = saying(tokenizer, "to be.<end>or not")
    streamer = Written(tokenizer)
    generate(model, [[]], max_new_tokens=number, block_length=8, streamer=streamer)
    assert streamer.text == "to be.<end>"

    streamer = Written(tokenizer, skip_special_tokens=True)
    generate(model, [[]], max_new_tokens=number, block_length=4, streamer=streamer)
    assert streamer.text == "to be."


def test_a_block_is_put_when_it_is_finished(tokenizer):
    model, number = saying(tokenizer, "abcdefgh")
    streamer = Written(tokenizer)
    generate(model, [[3]], max_new_tokens=number - 1, block_length=3, streamer=streamer)
    assert [len(value) for value in streamer.puts if len(value)] == [1, 3, 3, 1]


def test_drafts_show_the_block_as_it_settles(tokenizer):
    model, number = saying(tokenizer, "abcd")
    streamer = Written(tokenizer)
    generate(model, [[]], max_new_tokens=number, block_length=2, streamer=streamer)
    assert streamer.drafts == ["a<mask>", "ab", "c<mask>", "cd"]


@pytest.mark.parametrize("number", [0, 4])
def test_infilled_text_is_streamed_whole_and_in_order(model, policy, tokenizer, number):
    row = [
        *tokenizer("to ")["input_ids"],
        MASK,
        MASK,
        *tokenizer(" or ")["input_ids"],
        MASK,
        *tokenizer("!")["input_ids"],
    ]
    streamer = Written(tokenizer)
    options = {"max_new_tokens": number, "block_length": 3, "cache_policy": policy, "eos_token_id": []}
    output = generate(model, [row], streamer=streamer, **options)
    assert streamer.text == tokenizer.decode(output.sequences[0])
    assert "<mask>" not in streamer.text


def test_nothing_to_fill_streams_the_prompt(model, tokenizer):
    streamer = Written(tokenizer)
    generate(model, [tokenizer("to be")["input_ids"]], max_new_tokens=0, streamer=streamer)
    assert (streamer.text, streamer.ended) == ("to be", True)


def test_a_streamer_changes_no_token(model, policy, tokenizer):
    options = {"max_new_tokens": 8, "block_length": 4, "cache_policy": policy, "remasking_strategy": "sequential"}
    assert new_tokens(model, [5, 6], streamer=Written(tokenizer), **options) == new_tokens(model, [5, 6], **options)


def test_the_librarys_text_streamer_prints_the_final_text(tokenizer, capsys):
    model, number = saying(tokenizer, "to be or not")
    generate(model, [[]], max_new_tokens=number, block_length=3, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == "to be or not\n"


def test_the_librarys_diffusion_streamer_leaves_the_final_text_on_the_screen(tokenizer, capsys):
    model, number = saying(tokenizer, "to be or not")
    generate(model, [[]], max_new_tokens=number, block_length=3, streamer=TextDiffusionStreamer(tokenizer))
    screen = ""
    for piece in capsys.readouterr().out.split("\0337"):
        # A draft stands between "save the cursor" and "restore it and clear to the end of the screen".
        screen += piece.partition("\0338\033[J")[2] if "\0338" in piece else piece
    assert screen == "to be or not\n"


def test_the_librarys_iterator_streamer_gives_the_text_to_another_thread(tokenizer):
    model, number = saying(tokenizer, "to be or not")
    streamer = TextIteratorStreamer(tokenizer, timeout=600)
    options = {"max_new_tokens": number, "block_length": 3, "streamer": streamer}
    thread = Thread(target=generate, args=(model, [[]]), kwargs=options)
    thread.start()
    assert "".join(streamer) == "to be or not"
    thread.join()
