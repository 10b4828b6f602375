"""`LLM` and `SamplingParams`: what programs and servers call."""

import re
import threading
import time
import weakref

import pytest
import torch
from transformers.utils import logging

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import QueueFullError

from ..builders import END, MASK, VOCAB, ScriptedModel, character_tokenizer, generators, new_model, script, tiny_model

ROOM = {"max_tokens": 8, "block_length": 4}


def scripted(text: str, **options) -> LLM:
    """A model that continues an empty prompt with a text, whose blocks settle from left to right."""
    tokens = character_tokenizer()(text)["input_ids"]
    return LLM(ScriptedModel(script(tokens), eos_token_id=END), tokenizer=character_tokenizer(), **options)


# --- generate


def test_outputs_come_in_the_order_of_the_prompts_however_long_each_takes(llm):
    prompts = ["abc", "de", "f", "ghij", "k"]
    lengths = [12, 1, 7, 2, 9]
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=n, options={"eos_token_id": []}) for n in lengths])
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.outputs[0].finish_reason == "length" and output.finished for output in outputs)


def test_a_progress_bar_shows_requests_and_tokens_a_second(llm, capsys):
    llm.generate(["abc", "de"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 40)])
    shown = re.findall(r"(\d)/2 [^\r]*?(\d+) tokens/s", capsys.readouterr().err)
    assert shown[-1][0] == "2" and all(int(speed) > 0 for _, speed in shown)
    llm.generate(["abc"], SamplingParams(max_tokens=1), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_strings_token_ids_and_one_prompt_alone_are_prompts(llm):
    params = SamplingParams(**ROOM)
    [by_text], [by_ids] = llm.generate("abc", params), llm.generate([0, 1, 2], params)
    [first, second] = llm.generate(["abc", [0, 1, 2]], params)
    assert by_text.outputs == by_ids.outputs == first.outputs == second.outputs
    assert llm.generate([], params) == []


def test_chats_go_through_the_chat_template(llm):
    llm.tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}:{% endfor %}"
    [output] = llm.generate([{"role": "user", "content": "abc"}], SamplingParams(**ROOM))
    assert output.prompt == "abc:"


def test_several_samples_are_those_of_following_seeds(llm):
    params = SamplingParams(temperature=1.0, seed=5, n=3, **ROOM)
    [output] = llm.generate(["abc"], params)
    assert [each.index for each in output.outputs] == [0, 1, 2]
    for each, generator in zip(output.outputs, generators([5, 6, 7])):
        alone = llm.model.diffusion_generate(
            torch.tensor([[0, 1, 2]]), generator=[generator], temperature=1.0, cache_policy="dual",
            max_new_tokens=8, block_length=4,
        )  # fmt: skip
        assert each.token_ids == [token for token in alone[0, 3:].tolist() if token != END] + [END] * (
            each.finish_reason == "stop"
        )


def test_without_a_seed_torchs_own_decides(llm):
    params = SamplingParams(temperature=3.0, **ROOM)
    torch.manual_seed(3)
    first = llm.generate(["abc"], params)[0].outputs
    again = llm.generate(["abc"], params)[0].outputs
    torch.manual_seed(3)
    assert llm.generate(["abc"], params)[0].outputs == first != again


def test_masks_in_a_prompt_are_filled(llm):
    [output] = llm.generate(["ab<mask><mask>c"], SamplingParams(max_tokens=0))
    [completion] = output.outputs
    assert completion.token_ids == [] and MASK in output.prompt_token_ids
    filled = completion.filled_prompt_token_ids
    assert MASK not in filled and [filled[0], filled[1], filled[4]] == [0, 1, 2]
    assert completion.filled_prompt == llm.tokenizer.decode(filled, skip_special_tokens=True)


def test_a_completion_ends_with_its_end_token_and_has_no_padding():
    llm = scripted("abc")
    llm.model.script = script([0, 1, END, 5, 6, 7])
    [output] = llm.generate([[]], SamplingParams(max_tokens=6, block_length=3))
    assert output.outputs[0].token_ids == [0, 1, END]
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", "stop")
    [output] = llm.generate([[]], SamplingParams(max_tokens=6, block_length=3, ignore_eos=True))
    assert output.outputs[0].token_ids == [0, 1, END, 5, 6, 7]
    [output] = llm.generate([[]], SamplingParams(max_tokens=6, block_length=3, ignore_eos=True, stop_token_ids=[5]))
    assert output.outputs[0].token_ids == [0, 1, END, 5]


def test_a_stop_string_ends_the_text_which_does_not_show_it():
    llm = scripted("one, two, three")
    [output] = llm.generate([[]], SamplingParams(max_tokens=15, block_length=5, stop=[" two", "x"]))
    [completion] = output.outputs
    assert (completion.text, completion.finish_reason) == ("one,", "stop")
    assert llm.tokenizer.decode(completion.token_ids) == "one, two"


def test_how_many_passes_a_completion_took_is_said(llm):
    [output] = llm.generate(["abc"], SamplingParams(denoising_steps=2, options={"eos_token_id": []}, **ROOM))
    assert output.outputs[0].num_forward_passes == 4
    assert output.outputs[0].tokens_per_forward == 2.0


@pytest.mark.parametrize(
    "family, length, arguments",
    [
        ("sdar", 4, {"temperature": 1.0, "max_tokens": 1024, "remasking_strategy": "entropy_bounded", "block_length": 4, "denoising_steps": 4, "eb_threshold": 0.6}),
        ("llada", 32, {"temperature": 0.7, "max_tokens": 256, "remasking_strategy": "low_confidence", "block_length": 32, "denoising_steps": 32}),
        ("dream", 32, {"temperature": 0.2, "topk": 0, "topp": 0.95, "max_tokens": 512, "remasking_strategy": "entropy_bounded", "block_length": 16, "denoising_steps": 512, "dynamic_threshold": 0.0}),
    ],
    ids=["sdar", "llada", "dream"],
)  # fmt: skip
def test_the_examples_of_blockinfer_work_as_written(family, length, arguments, tmp_path):
    """From a folder with a tokenizer, for texts."""
    positions = {"max_sequence_length" if family == "llada" else "max_position_embeddings": 1200}
    new_model(family, **positions).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), mask_token_id=MASK, block_length=length)
    outputs = llm.generate(["abc", "de"], SamplingParams(**arguments))
    for output in outputs:
        [completion] = output.outputs
        assert completion.text and MASK not in completion.token_ids
        assert completion.finish_reason == "stop" or len(completion.token_ids) == arguments["max_tokens"]


@pytest.mark.parametrize(
    "strategy",
    ["sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "low_confidence", "random"],
)
def test_the_strategies_of_blockinfer_are_served(llm, strategy):
    [output] = llm.generate(["abc"], SamplingParams(remasking_strategy=strategy, options={"eos_token_id": []}, **ROOM))
    assert len(output.outputs[0].token_ids) == 8


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path, caplog):
    tiny = tiny_model("sdar")
    tiny.save_pretrained(tmp_path)
    llm = LLM(tmp_path, device="cpu")
    [output] = llm.generate([[1, 2, 3]], SamplingParams(**ROOM))
    assert output.outputs[0].token_ids and output.outputs[0].text == ""
    with pytest.raises(ValueError, match="there is no tokenizer: pass token ids"):
        llm.generate(["abc"], SamplingParams(**ROOM))
    with pytest.raises(ValueError, match="no tokenizer: use `stop_token_ids`"):
        llm.generate([[1, 2]], SamplingParams(stop="a", **ROOM))


# --- events


def test_the_events_texts_are_the_completions_text():
    llm = scripted("hello, world - and so on")
    events = list(llm.generate_streaming([[], []], SamplingParams(max_tokens=20, block_length=4, stop="- an")))
    for name in {event.request_id for event in events}:
        own = [event for event in events if event.request_id == name]
        assert len(own) > 3
        assert "".join(event.text for event in own) == own[-1].output.text == "hello, world "
        assert sum((event.token_ids for event in own), []) == own[-1].output.token_ids
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + ["stop"]
        assert own[-1].usage.completion_tokens == len(own[-1].output.token_ids)


def test_what_may_become_a_stop_string_is_held_back():
    llm = scripted("abcdefgh")
    texts = [
        event.text for event in llm.generate_streaming([[]], SamplingParams(max_tokens=8, block_length=2, stop="dX"))
    ]
    assert texts == ["ab", "c", "def", "gh", ""]


def test_half_a_character_is_held_back():
    from dllm_hf.engine.detokenizer import Detokenizer

    class Bytes:
        def decode(self, tokens, **options):
            return bytes(tokens).decode("utf-8", errors="replace")

    texts = Detokenizer(Bytes(), [])
    tokens = list("aä€".encode())
    assert [texts.put(tokens[:size]) for size in range(1, len(tokens) + 1)] == ["a", "", "ä", "", "", "€"]


def test_drafts_show_the_whole_canvas_masks_included(llm):
    events = list(llm.generate_streaming(["abc"], SamplingParams(options={"eos_token_id": []}, **ROOM), drafts=True))
    drafts = [event.draft for event in events if event.draft is not None]
    assert len(drafts) == 8  # after each step
    assert [draft.count("<mask>") for draft in drafts] == [7, 6, 5, 4, 3, 2, 1, 0]


def test_who_stops_to_read_aborts_the_rest(llm):
    stream = llm.generate_streaming(["abc", "de", "f"], SamplingParams(max_tokens=30, block_length=4))
    next(stream)
    stream.close()
    assert llm._driver.engine.is_idle and all(row is None for row in llm._driver.engine._decoder.rows)


def test_a_stop_string_across_a_special_token_that_the_text_leaves_out_takes_nothing_away():
    llm = scripted("xa<end>bcd")
    params = SamplingParams(max_tokens=6, block_length=2, stop="ab", ignore_eos=True)
    events = list(llm.generate_streaming([[]], params))
    assert "".join(event.text for event in events) == events[-1].output.text == "xabcd"
    assert events[-1].finish_reason == "length"


def test_who_stops_to_read_events_finds_the_others_later(llm):
    names = [llm.submit(prompt, SamplingParams(max_tokens=4, block_length=4)) for prompt in ("abc", "de")]
    seen = []
    while len(seen) < 2:
        event = next(llm.events())
        seen += [event.request_id] if event.output is not None else []
    assert sorted(seen) == names and list(llm.events()) == []


# --- for servers


def test_an_id_that_was_aborted_after_its_end_can_be_taken_again(llm):
    params = SamplingParams(max_tokens=4, options={"eos_token_id": []})
    llm.submit("abc", params, request_id="x")
    list(llm.events())
    llm.abort("x")
    llm.submit("abc", params, request_id="x")
    assert [event.finish_reason for event in llm.events() if event.output] == ["length"]


def test_numbered_ids_pass_over_one_that_is_taken(llm):
    llm.submit("a", SamplingParams(**ROOM), request_id="request-1")
    assert [output.request_id for output in llm.generate(["a", "b"], SamplingParams(**ROOM))] == [
        "request-0",
        "request-2",
    ]


@pytest.mark.parametrize(
    "request_ids, message",
    [
        (["x", "x"], "`request_id='x'` is given twice"),
        (["x"], "`request_ids` lists 1 for 2 prompts"),
        (["x", 5], "`request_ids` must be a list of strings"),
        (["x", "taken"], "`request_id='taken'` is that of a request which has not finished"),
    ],
)
def test_wrong_ids_are_refused_before_anything_is_submitted(llm, request_ids, message):
    llm.submit("a", SamplingParams(**ROOM), request_id="taken")
    with pytest.raises(ValueError, match=message):
        llm.generate_streaming(["a", "b"], SamplingParams(**ROOM), request_ids=request_ids)


def test_requests_are_submitted_and_aborted_while_others_run(llm):
    first = llm.submit("abc", SamplingParams(max_tokens=20, block_length=4))
    second = llm.submit("de", SamplingParams(max_tokens=20, block_length=4), request_id="mine")
    assert second == "mine"
    reasons = {}
    for event in llm.events():
        llm.abort("mine")
        if event.output is not None:
            reasons[event.request_id] = event.finish_reason
    assert reasons["mine"] == "abort" and reasons[first] in ("length", "stop")


def test_threads_share_an_engine_and_each_gets_its_own():
    llm = LLM(tiny_model("sdar"), max_num_seqs=3)
    prompts = [[number, number + 1] for number in range(8)]
    params = SamplingParams(max_tokens=12)
    expected = [llm.generate([prompt], params)[0].outputs for prompt in prompts]
    got = [None] * len(prompts)

    def ask(number):
        got[number] = llm.generate([prompts[number]], params, use_tqdm=False)[0].outputs

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == expected


def test_a_server_waits_for_requests_until_it_is_closed():
    llm, seen = LLM(tiny_model("sdar")), []
    server = threading.Thread(target=lambda: seen.extend(llm.events(wait=True)))
    server.start()
    for _ in range(2):
        llm.submit([1, 2], SamplingParams(max_tokens=4))
        deadline = time.monotonic() + 30
        while not (seen and seen[-1].output) and time.monotonic() < deadline:
            time.sleep(0.01)
    llm.close()
    server.join(30)
    assert not server.is_alive() and sum(event.output is not None for event in seen) == 2
    with pytest.raises(ValueError, match="closed"):
        llm.submit([1, 2], SamplingParams(max_tokens=4))


def test_logits_that_are_no_numbers_are_warned_of_once(caplog, monkeypatch):
    logger = logging.get_logger("dllm_hf.generation.canvas")
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.cache_clear()
    for value, number in ((0.0, 0), (torch.nan, 1)):
        llm = LLM(ScriptedModel(torch.full((8, VOCAB), value)), num_cache_tokens=99)
        llm.generate([[1, 2], [3]], SamplingParams(max_tokens=4))
        assert sum("float16" in record.message for record in caplog.records) == number


def test_a_full_queue_refuses_and_generate_waits_for_room():
    llm = LLM(tiny_model("sdar"), max_num_seqs=1, max_queue=2)
    for _ in range(2):
        llm.submit([1, 2], SamplingParams(max_tokens=4))
    with pytest.raises(QueueFullError, match="2 completions are waiting.*`max_queue` is 2"):
        llm.submit([1, 2], SamplingParams(max_tokens=4))
    assert len(llm.generate([[1, 2]] * 6, SamplingParams(max_tokens=4))) == 6
    assert sum(event.output is not None for event in llm.events()) == 2


def test_a_request_ends_at_its_deadline_with_what_is_final(own_model):
    llm = LLM(own_model, max_num_seqs=1)
    own_model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    params = [SamplingParams(max_tokens=100, timeout=0.6, ignore_eos=True), SamplingParams(max_tokens=4, timeout=0.1)]
    running, waiting = llm.generate([[1, 2], [3, 4]], params)
    assert running.outputs[0].finish_reason == waiting.outputs[0].finish_reason == "timeout"
    assert 0 < len(running.outputs[0].token_ids) < 100 and waiting.outputs[0].token_ids == []


def test_leaving_the_context_aborts_what_runs(llm):
    with llm:
        llm.submit("abc", SamplingParams(max_tokens=30))
    assert [event.finish_reason for event in llm.events()] == ["abort"]


@pytest.mark.usefixtures("captured", "uncollected")
@pytest.mark.parametrize("family, policy", [("llada", "dual"), ("sdar", "block"), ("gla_dream", "block")])
def test_the_memory_of_an_engine_is_free_when_the_last_name_of_it_is_gone(family, policy):
    """The next one in a notebook looks at how much there is."""
    llm = LLM(tiny_model(family), max_num_seqs=2, block_length=4, cache_policy=policy)
    llm.generate([[1, 2], [3]], SamplingParams(max_tokens=8), use_tqdm=False)
    decoder = llm._driver.engine._decoder
    kept = [weakref.ref(each) for each in (decoder.workspace.state, decoder.canvas, decoder.workspace.graphs)]
    del decoder, llm
    assert [each() for each in kept] == [None] * 3


# --- the model's owner changes it, and calls from where they come


def tokens_of(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([list(range(3, 33))], SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", ["llada", "sdar", "gla_dream", "nemotron_diffusion"])
@pytest.mark.parametrize("change", ["weights", "hook", "switch"])
def test_beginnings_go_with_the_weights_that_computed_them(family, change):
    """Of a model in training, with hooks that steer it, and whose adapters are switched."""
    policy = "dual" if family == "llada" else "block"
    model, engine = new_model(family), {"block_length": 4, "cache_policy": policy}
    layer = model.get_submodule("model.layers.0.mlp")
    plain, layer.switch = layer.forward, False
    layer.forward = lambda *args: plain(*args) * (-1 if layer.switch else 1)
    llm = LLM(model, **engine)
    before = tokens_of(llm)
    if change == "weights":
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) / 2)
    elif change == "hook":
        layer.register_forward_hook(lambda module, inputs, output: -output)
    else:
        layer.switch = True
    expected = tokens_of(LLM(model, **engine))
    assert tokens_of(llm) == expected != before


@pytest.mark.parametrize("makes_it", [True, False])
def test_an_engine_works_in_and_outside_of_inference_mode(makes_it, own_model):
    expected = tokens_of(LLM(own_model))
    llm = None if makes_it else LLM(own_model)
    with torch.inference_mode():
        llm = llm or LLM(own_model)
        assert tokens_of(llm) == expected
    assert tokens_of(llm) == expected


def test_code_that_a_step_runs_cannot_wait_for_it(own_model):
    llm = LLM(own_model)
    hook = own_model.register_forward_hook(lambda *_: llm.generate([[1]], SamplingParams(max_tokens=4)))
    (output,) = llm.generate([[1, 2]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error" and "in the middle of a step" in str(output.outputs[0].error)
    hook.remove()
    assert len(tokens_of(llm)[0]) == 12


def test_an_engine_that_failed_once_goes_like_any_other(own_model, uncollected):
    llm, forward = LLM(own_model), own_model.lm_head.forward
    own_model.lm_head.forward = lambda *_: 1 / 0
    (output,) = llm.generate([[1]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    own_model.lm_head.forward = forward
    assert len(tokens_of(llm)[0]) == 12
    kept = weakref.ref(llm._driver.engine)
    del llm
    assert kept() is None


# --- bad input


def test_as_many_parameters_as_prompts_or_one(llm):
    with pytest.raises(ValueError, match="lists 2 for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)


@pytest.mark.parametrize("name", ["", "model.layers.1.self_attn"])
def test_dropout_is_off_and_what_was_in_training_mode_stays_in_it(name):
    model = new_model("sdar", attention_dropout=0.9)
    llm, params = LLM(model), SamplingParams(max_tokens=16, ignore_eos=True)
    expected = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    module = model.get_submodule(name).train()
    assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert all(each.training for each in module.modules())
