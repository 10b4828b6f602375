"""`pipeline("text-generation")` writes what `diffusion_generate` writes, by the model's settings and not by its own."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextDiffusionStreamer, TextStreamer, pipeline

from dllm_hf import DiffusionGenerationConfig
from dllm_hf.generation.inputs import DEFAULT_MAX_NEW_TOKENS

from ..builders import BUILDERS, END, ScriptedModel, character_tokenizer, new_model, recorded, script

PROMPTS = ["to be", "or not to be", "that is"]
CHAT = [{"role": "user", "content": "to be"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
# Nothing is drawn, and no text ends early.
FIRM = {"max_new_tokens": 8, "remasking_strategy": "low_confidence_static", "suppress_tokens": [END]}


@pytest.fixture(params=BUILDERS)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer():
    """One's own, which the pipeline changes."""
    return character_tokenizer()


@pytest.fixture
def used(monkeypatch):
    """The configuration that each call of `generate` ends up with."""
    configs = []
    prepare = DiffusionGenerationConfig.updated

    def look(self, **kwargs):
        configs.append(prepare(self, **kwargs))
        return configs[-1]

    monkeypatch.setattr(DiffusionGenerationConfig, "updated", look)
    return configs


def completions(model, tokenizer, prompts, **options) -> list[str]:
    """What `diffusion_generate` continues the prompts with, as one batch."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = model.diffusion_generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def saved(family, folder, **settings):
    """A model loaded from a folder whose generation_config.json says `settings`, or that has no such file."""
    model = new_model(family)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    if not settings:
        (folder / "generation_config.json").unlink()
    return AutoModelForCausalLM.from_pretrained(folder)


def settings_of(config) -> tuple:
    return config.max_new_tokens, config.sampling_temperature


# Whose settings count


def test_settings_of_the_file_win_over_those_of_the_pipeline(family, tokenizer, tmp_path, used):
    model = saved(family, tmp_path, max_new_tokens=6, temperature=0.2, remasking_strategy="sequential", top_k=3)
    pipeline("text-generation", model=model, tokenizer=tokenizer)("to be")
    assert settings_of(used[-1]) == (6, 0.2)
    assert (used[-1].remasking_strategy, used[-1].top_k, used[-1].do_sample) == ("sequential", 3, None)


def test_a_file_that_asks_for_no_sampling_gets_none(family, tokenizer, tmp_path, used):
    model = saved(family, tmp_path, max_new_tokens=6, temperature=0.0)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with torch.random.fork_rng():
        texts = {write("to be")[0]["generated_text"] for _ in range(2)}
    assert settings_of(used[-1]) == (6, 0.0)
    if family != "dream":  # which chooses at random where to write, unless it is told not to
        assert len(texts) == 1


def test_without_a_file_our_own_defaults_count(family, tokenizer, tmp_path, used):
    model = saved(family, tmp_path)
    limit = model.config.max_position_embeddings
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert DEFAULT_MAX_NEW_TOKENS == limit  # so that no prompt fits: the error says what would be written
    with pytest.raises(ValueError, match=f"max_new_tokens={DEFAULT_MAX_NEW_TOKENS}"):
        write("to be")
    assert settings_of(used[-1]) == (None, 0.0)


def test_what_the_call_says_wins(family, tokenizer, tmp_path, used):
    model = saved(family, tmp_path, max_new_tokens=6, temperature=0.2, remasking_strategy="sequential")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    write("to be", max_new_tokens=2, temperature=0.9, remasking_strategy="random")
    assert settings_of(used[-1]) == (2, 0.9)
    assert used[-1].remasking_strategy == "random"
    write("to be", do_sample=False)
    assert settings_of(used[-1]) == (6, 0.0)
    write("to be", do_sample=True, temperature=0.7, max_new_tokens=4)  # the pipeline's own values, now meant
    assert settings_of(used[-1]) == (4, 0.7)


def test_what_the_pipeline_was_made_with_wins_and_gives_way_to_the_call(family, tokenizer, tmp_path, used):
    model = saved(family, tmp_path, max_new_tokens=6, temperature=0.2, remasking_strategy="sequential")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=3, remasking_strategy="random")
    write("to be")
    assert (*settings_of(used[-1]), used[-1].remasking_strategy) == (3, 0.2, "random")
    write("to be", max_new_tokens=2)
    assert (*settings_of(used[-1]), used[-1].remasking_strategy) == (2, 0.2, "random")


@pytest.mark.parametrize("kind", [DiffusionGenerationConfig, GenerationConfig])
def test_a_configuration_given_to_the_call_counts_as_it_is(family, tokenizer, kind, used):
    write = pipeline("text-generation", model=new_model(family), tokenizer=tokenizer)
    write("to be", generation_config=kind(max_new_tokens=2))
    assert settings_of(used[-1]) == (2, 0.0)


def test_the_pipeline_leaves_the_settings_of_the_model_as_they_are(family, tokenizer, tmp_path):
    model = saved(family, tmp_path, max_new_tokens=6, temperature=0.2)
    before = model.generation_config.to_dict()
    pipeline("text-generation", model=model, tokenizer=tokenizer, do_sample=True)("to be", max_new_tokens=2)
    assert model.generation_config.to_dict() == before


def test_what_is_saved_does_not_name_what_nobody_has_set(family, tmp_path):
    model = saved(family, tmp_path, max_new_tokens=6)
    content = (tmp_path / "generation_config.json").read_text()
    assert '"max_new_tokens": 6' in content
    assert "do_sample" not in content and "temperature" not in content
    assert repr(model.generation_config).count("do_sample") == 0


# What it reads and writes


def test_a_string_is_continued(model, tokenizer):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [new] = completions(model, tokenizer, ["to be"], **FIRM)
    assert len(new) >= 1
    assert write("to be", **FIRM) == [{"generated_text": "to be" + new}]
    assert write("to be", return_full_text=False, **FIRM) == [{"generated_text": new}]


def test_a_batch_is_padded_on_the_left_whatever_the_tokenizer_says(model, tokenizer):
    options = {**FIRM, "return_full_text": False}
    tokenizer.padding_side = "right"
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert tokenizer.padding_side == "left"
    alone = [write(prompt, **options) for prompt in PROMPTS]
    with recorded(model) as fed:
        assert write(PROMPTS, batch_size=3, **options) == alone
    assert max(len(call["input_ids"]) for call in fed) == 3


def test_several_completions_of_a_prompt(model, tokenizer):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    outputs = write(PROMPTS[:2], batch_size=2, max_new_tokens=4, num_return_sequences=3, temperature=5.0)
    assert [len(output) for output in outputs] == [3, 3]
    for prompt, output in zip(PROMPTS, outputs):
        assert all(text["generated_text"].startswith(prompt) for text in output)


def test_a_chat_is_answered(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [answer] = completions(model, tokenizer, ["user: to be\nassistant: "], **FIRM)
    expected = [{"generated_text": [*CHAT, {"role": "assistant", "content": answer}]}]
    assert write(CHAT, **FIRM) == expected
    assert write([CHAT, CHAT], **FIRM) == [expected, expected]


def test_an_answer_that_was_begun_is_gone_on_with(tokenizer):
    tokenizer.chat_template = TEMPLATE
    said = [*CHAT, {"role": "assistant", "content": "or"}]
    prompt = tokenizer.apply_chat_template(said, continue_final_message=True, return_dict=True)["input_ids"]
    model = ScriptedModel(script(tokenizer(" not")["input_ids"], prompt=len(prompt)))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert write(said, max_new_tokens=4)[0]["generated_text"][-1] == {"role": "assistant", "content": "or not"}


def test_what_follows_the_end_of_sequence_is_not_shown(tokenizer):
    model = ScriptedModel(script([*tokenizer("hello")["input_ids"], END, 5, 6], prompt=5))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert write("to be", max_new_tokens=8, block_length=4) == [{"generated_text": "to behello"}]


@pytest.mark.parametrize("kind", [TextStreamer, TextDiffusionStreamer])
def test_a_streamer_shows_what_is_returned(model, tokenizer, kind, capsys):
    streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {**FIRM, "return_full_text": False}
    [output] = write("to be", streamer=streamer, **options)
    without_drafts = re.sub("\x1b7.*?\x1b8\x1b\\[J", "", capsys.readouterr().out)
    assert without_drafts == output["generated_text"] + "\n"


def test_masks_in_the_prompt_are_filled(model, tokenizer):
    text = "to <mask><mask> or <mask><mask><mask> to be"
    options = {**FIRM, "max_new_tokens": 0}
    inputs = tokenizer(text, return_tensors="pt")
    expected = model.diffusion_generate(**inputs, **options)[0].tolist()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # As text the pipeline repeats the prompt as it was given and adds what follows it.
    [output] = write(text, return_tensors=True, **options)
    filled = output["generated_token_ids"]
    assert filled == expected and tokenizer.mask_token_id not in filled
    assert len(filled) == inputs["input_ids"].shape[1]
    assert tokenizer.decode(filled).startswith("to ")


def test_a_prompt_is_cut_to_make_room_where_that_is_asked_for(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 12)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {**FIRM, "return_tensors": True}
    [output] = write("or not to be", handle_long_generation="hole", **options)
    assert len(output["generated_token_ids"]) == 12
