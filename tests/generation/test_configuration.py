"""`DiffusionGenerationConfig`: options, the originals' names for them, and `generation_config.json`."""

import json

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from dllm_hf import STRATEGIES, DiffusionGenerationConfig
from dllm_hf.generation.configuration import ALIASES

from ..builders import END, MASK, ScriptedModel, generate, left_pad, new_model, script

PROMPT = left_pad([[5, 6, 7]])

CONFIDENT = script([10, 11, 12, 13], [3.0, 9.0, 4.0, 8.0], prompt=2)


def outcome(**options):
    """The canvas after each step, and the forward passes: where two calls agree on these, they mean the same."""
    model = ScriptedModel(CONFIDENT)
    options = {"max_new_tokens": 4, **options}
    output = generate(model, [[1, 2]], output_history=True, **options)
    return [step.tolist() for step in output.history], output.num_forward_passes


@pytest.mark.parametrize(
    "original, ours",
    [
        ({"max_steps": 2}, {"steps": 2}),
        ({"remasking": "sequential"}, {"remasking_strategy": "sequential"}),
        ({"remasking": "low_confidence"}, {"remasking_strategy": "low_confidence_static"}),
        ({"remasking_strategy": "low_confidence"}, {"remasking_strategy": "low_confidence_static"}),
        ({"alg": "topk_margin", "steps": 3}, {"remasking_strategy": "topk_margin", "steps": 3}),
        ({"threshold": 0.9}, {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9}),
        ({"dynamic_threshold": 0.9}, {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9}),
        (
            {"remasking": "low_confidence", "threshold": 0.9},
            {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9},
        ),
        ({"remasking": "low_confidence", "factor": 0.2}, {"remasking_strategy": "factor", "factor": 0.2}),
        ({"eb_threshold": 0.5}, {"remasking_strategy": "entropy_bounded", "entropy_bound": 0.5}),
        ({"mask_id": 63}, {"mask_token_id": 63}),
        ({"threshold": 0.9, "steps_per_look": 2}, {"threshold": 0.9, "check_interval": 2}),
    ],
    ids=lambda options: "-".join(options),
)
def test_the_names_of_the_originals_mean_the_same_as_ours(original, ours):
    assert outcome(**original) == outcome(**ours)


@pytest.mark.parametrize("original", ALIASES)
def test_a_name_of_the_originals_is_stored_under_ours(original):
    ours = ALIASES[original]
    value = {"remasking_strategy": "entropy"}.get(ours, 1)
    assert getattr(DiffusionGenerationConfig(**{original: value}), ours) == value


def test_a_stored_check_interval_is_read_under_its_earlier_name():
    assert DiffusionGenerationConfig.from_dict({"steps_per_look": 3}).check_interval == 3


def test_two_names_for_one_option_must_agree():
    assert DiffusionGenerationConfig(gen_length=3, max_new_tokens=3).max_new_tokens == 3
    with pytest.raises(ValueError, match="`max_new_tokens=4` contradicts"):
        DiffusionGenerationConfig(gen_length=3, max_new_tokens=4)


def test_an_option_that_is_none_is_one_that_is_not_given():
    assert DiffusionGenerationConfig(gen_length=None, max_new_tokens=4).max_new_tokens == 4
    assert DiffusionGenerationConfig(cfg_scale=None).cfg_scale == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_stored_and_read_back(tmp_path, strategy):
    config = DiffusionGenerationConfig(remasking_strategy=strategy, confidence_threshold=0.5, steps=3)
    config.save_pretrained(tmp_path)
    assert DiffusionGenerationConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_every_strategy_can_be_named_in_a_call():
    for strategy in STRATEGIES:
        config = DiffusionGenerationConfig().updated(remasking_strategy=strategy)
        assert config.remasking_strategy == strategy


def test_an_option_of_the_call_replaces_that_of_the_configuration_and_leaves_the_rest():
    stored = DiffusionGenerationConfig(steps=4, temperature=0.5, remasking_strategy="sequential")
    config = stored.updated(denoising_steps=2, temperature=0.7)
    assert (config.steps, config.denoising_steps) == (None, 2)
    assert (config.temperature, config.remasking_strategy) == (0.7, "sequential")
    assert stored.steps == 4


def test_do_sample_turns_the_temperature_off_and_on():
    assert DiffusionGenerationConfig(temperature=0.7, do_sample=False).sampling_temperature == 0
    assert DiffusionGenerationConfig(do_sample=True).sampling_temperature == 1
    assert DiffusionGenerationConfig(temperature=0.7).sampling_temperature == 0.7
    assert DiffusionGenerationConfig().sampling_temperature == 0
    with pytest.raises(ValueError, match="`do_sample=True` contradicts `temperature=0`"):
        DiffusionGenerationConfig().updated(do_sample=True, temperature=0)


def test_a_model_saves_and_loads_its_generation_config(family, tmp_path):
    model = new_model(family)
    model.generation_config = DiffusionGenerationConfig(
        steps=3, max_new_tokens=6, remasking_strategy="sequential", mask_token_id=MASK, eos_token_id=[END, 5]
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded.generation_config) is DiffusionGenerationConfig
    for name in DiffusionGenerationConfig.DEFAULTS:
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name), name
    assert loaded.diffusion_generate(**PROMPT).shape == (1, 9)


def test_a_model_without_a_generation_config_file_has_one_with_its_special_tokens(family, tmp_path):
    new_model(family).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is DiffusionGenerationConfig
    assert loaded.generation_config.mask_token_id == MASK


def test_a_published_file_with_options_of_the_library_loads(family, tmp_path):
    new_model(family).save_pretrained(tmp_path)
    published = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": END}
    published |= {"use_cache": False, "num_beams": 1, "repetition_penalty": 1.1, "transformers_version": "4.46.2"}
    (tmp_path / "generation_config.json").write_text(json.dumps(published))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.bos_token_id == 1
    assert loaded.diffusion_generate(**PROMPT, max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("content", ["", "{", '{"max_new_tokens": 3', "[]", None], ids=repr)
def test_a_file_that_cannot_be_read_is_refused_by_name(family, tmp_path, content):
    new_model(family).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match="generation_config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_file_with_an_unknown_key_is_refused_by_name(family, tmp_path):
    new_model(family).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"blok_length": 4}))
    with pytest.raises(ValueError, match="`blok_length`.*block_length"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_plain_generation_config_of_the_library_is_accepted(model):
    output = model.diffusion_generate(**PROMPT, generation_config=GenerationConfig(max_new_tokens=2))
    assert output.shape == (1, 5)


def test_generate_is_diffusion_generate(model):
    options = {"max_new_tokens": 5, "remasking_strategy": "low_confidence_static"}
    expected = model.diffusion_generate(**PROMPT, **options)
    assert model.generate(**PROMPT, **options).tolist() == expected.tolist()
    assert model.generate(PROMPT["input_ids"], **options).tolist() == expected.tolist()
    assert model.can_generate()


def test_a_call_changes_neither_the_generation_config_nor_the_mode_of_the_model(family):
    model = new_model(family).train()
    before = model.generation_config.to_dict()
    model.diffusion_generate(**PROMPT, max_new_tokens=2, steps=1, confidence_eos_eot_inf=True)
    assert model.generation_config.to_dict() == before
    assert model.training


def test_the_text_generation_pipeline_runs(family, tokenizer):
    write = pipeline("text-generation", model=new_model(family), tokenizer=tokenizer)
    [[short], [long]] = write(["to be", "or not to be"], batch_size=2, max_new_tokens=4)
    assert short["generated_text"].startswith("to be")
    assert long["generated_text"].startswith("or not to be")
