"""Every folder in `hub_configs/`: what it says loads, agrees with itself, and is what the model class accepts."""

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import dllm_hf
from dllm_hf import DiffusionGenerationConfig
from dllm_hf.generation.configuration import as_token_list

ROOT = Path(__file__).parent.parent / "hub_configs"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))

# Original repository, model class, parameters in billions. The names of SDAR-1.7B and SDAR-4B count as Qwen3's do, whose
# head is its embedding; SDAR's is not, and is left out of the count.
PUBLISHED = {
    "LLaDA-8B-Base": ("GSAI-ML", "LLaDAModelLM", 8.02),
    "LLaDA-8B-Instruct": ("GSAI-ML", "LLaDAModelLM", 8.02),
    "LLaDA-1.5": ("GSAI-ML", "LLaDAModelLM", 8.02),
    "Dream-v0-Base-7B": ("Dream-org", "DreamModel", 7.6),
    "Dream-v0-Instruct-7B": ("Dream-org", "DreamModel", 7.6),
    "SDAR-1.7B-Chat": ("JetLM", "SDARForCausalLM", 1.7),
    "SDAR-4B-Chat": ("JetLM", "SDARForCausalLM", 4.0),
    "SDAR-8B-Chat": ("JetLM", "SDARForCausalLM", 8.2),
    "SDAR-30B-A3B-Chat": ("JetLM", "SDARMoeForCausalLM", 30.5),
    "LLaDA2.0-mini": ("inclusionAI", "LLaDA2MoeModelLM", 16),
    "LLaDA2.1-mini": ("inclusionAI", "LLaDA2MoeModelLM", 16),
    "LLaDA2.1-flash": ("inclusionAI", "LLaDA2MoeModelLM", 103),
    "LLaDA-MoE-7B-A1B-Instruct": ("inclusionAI", "LLaDAMoEModelLM", 7.36),
    "Nemotron-Labs-Diffusion-8B": ("nvidia", "NemotronLabsDiffusionModel", 8.49),
    "Fast_dLLM_v2_7B": ("Efficient-Large-Model", "Fast_dLLM_QwenForCausalLM", 7.62),
    "Fast_dLLM_v2_1.5B": ("Efficient-Large-Model", "Fast_dLLM_QwenForCausalLM", 1.54),
}
LICENSES = {"GSAI-ML": "mit", "nvidia": "other"}  # of others Apache-2.0
COUNTED_WITHOUT_HEAD = ("SDAR-1.7B-Chat", "SDAR-4B-Chat")
# Half the bytes that the weight index of the checkpoint declares.
EXACT = {"LLaDA-8B-Instruct": 8_015_581_184, "SDAR-30B-A3B-Chat": 30_532_122_624}

# Sizes of a model that decodes in no time, in the library's names.
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SMALL |= {"layer_types": ["full_attention"], "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request) -> Path:
    return request.param


@pytest.fixture
def config(folder):
    return AutoConfig.from_pretrained(folder)


@pytest.fixture
def loud(caplog, monkeypatch):
    """Warnings are errors, and the library's log goes where the test can read it, also what it says only once."""
    transformers.utils.logging.enable_propagation()
    logger = dllm_hf.generation.configuration.logger
    monkeypatch.setattr(type(logger), "warning_once", type(logger).warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda: [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    transformers.utils.logging.disable_propagation()


def card(folder: Path) -> tuple[dict, str]:
    """The model card's header and its text."""
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def model_class(config) -> type:
    return AutoModelForCausalLM._model_mapping[type(config)]


def test_every_published_repository_has_a_folder():
    assert set(PUBLISHED) <= {folder.name for folder in FOLDERS}


def test_config_loads_into_its_class_without_a_warning(folder, loud):
    config = AutoConfig.from_pretrained(folder)
    assert [model_class(config).__name__] == config.architectures
    assert type(config) is model_class(config).config_class
    if folder.name in PUBLISHED:
        assert config.architectures == [PUBLISHED[folder.name][1]]
    assert loud() == []


def test_config_keeps_every_value_when_it_is_saved(folder, config, tmp_path):
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": None} == {**config.to_dict(), "_name_or_path": None}

    written = json.loads((folder / "config.json").read_text())
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {**saved["rope_parameters"], "torch_dtype": saved.get("dtype")}
    for name, value in written.items():
        # `null` may be filled in by what it stands for; the library saves `num_experts` under a name of its own.
        if value is not None and name != "transformers_version":
            assert saved.get(name, getattr(again, name, None)) == value, name


def test_config_names_the_values_that_decoding_needs(folder, config):
    written = json.loads((folder / "config.json").read_text())
    assert "mask_token_id" in written
    assert "auto_map" not in written  # there is no code beside it
    if "SDAR" in folder.name:
        assert (written["block_size"], written["mask_token_id"]) == (4, 151669)


def test_model_has_the_published_number_of_parameters(folder, config):
    if folder.name not in PUBLISHED:
        pytest.skip("not a published checkpoint")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == EXACT.get(folder.name, total)
    head = sum(parameter.numel() for parameter in model.get_output_embeddings().parameters())
    counted = total - head if folder.name in COUNTED_WITHOUT_HEAD else total
    assert counted / 1e9 == pytest.approx(PUBLISHED[folder.name][2], rel=0.03)
    assert model.get_input_embeddings().weight.shape == (config.vocab_size, config.hidden_size)
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_generation_config_loads_without_a_warning_and_names_our_options_only(folder, loud):
    settings = DiffusionGenerationConfig.from_pretrained(folder)
    assert type(settings) is DiffusionGenerationConfig
    written = json.loads((folder / "generation_config.json").read_text())
    written.pop("transformers_version", None)
    assert set(written) <= set(DiffusionGenerationConfig.DEFAULTS)
    assert {name: getattr(settings, name) for name in written} == written
    assert loud() == []


def test_generation_config_suits_the_model_class(folder, config):
    settings = DiffusionGenerationConfig.from_pretrained(folder)
    cls = model_class(config)
    assert settings.remasking_strategy in (None, *dllm_hf.STRATEGIES)
    assert settings.cache_policy in (None, *cls.cache_policies)
    assert settings.mask_token_id in (None, config.mask_token_id)
    assert settings.max_new_tokens <= config.max_position_embeddings


def test_special_tokens_are_in_the_vocabulary(folder, config):
    settings = DiffusionGenerationConfig.from_pretrained(folder)
    for source in (config, settings):
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "eot_token_id"):
            for token in as_token_list(getattr(source, name, None)):
                assert 0 <= token < config.vocab_size, name
    ends = as_token_list(settings.eos_token_id)
    if folder.name in PUBLISHED:
        assert set(as_token_list(config.eos_token_id)) <= set(ends)
    assert config.mask_token_id not in (*ends, config.pad_token_id)


def first_of_each_settings() -> list[Path]:
    """Of folders that differ in sizes alone, which a small model does not have, the first."""
    kinds = {}
    for folder in FOLDERS:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        kinds.setdefault((kind, (folder / "generation_config.json").read_text()), folder)
    return list(kinds.values())


@pytest.mark.parametrize("folder", first_of_each_settings(), ids=lambda folder: folder.name)
def test_a_small_model_decodes_with_the_recommended_settings(folder, config):
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    settings = DiffusionGenerationConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    output = model.diffusion_generate(prompt, generation_config=settings, max_new_tokens=6)
    assert output.shape == (1, 11)
    assert not (output == config.mask_token_id).any()


def test_card_has_the_header_that_the_hub_reads(folder):
    header, _ = card(folder)
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation"
    assert "diffusion" in header["tags"]
    assert header["license"]
    if folder.name in PUBLISHED:
        assert header["license"] == LICENSES.get(PUBLISHED[folder.name][0], "apache-2.0")
        assert header["base_model"] == f"{PUBLISHED[folder.name][0]}/{folder.name}"
        assert "text-diffusion" in header["tags"]


def test_card_has_code_that_compiles_and_loads_the_original(folder):
    blocks = re.findall(r"```python\n(.*?)```", card(folder)[1], flags=re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)
    code = "\n".join(blocks)
    assert "import dllm_hf" in code and "diffusion_generate" in code
    if folder.name in PUBLISHED:
        assert f'from_pretrained("{PUBLISHED[folder.name][0]}/{folder.name}")' in code


def test_card_says_what_is_recommended_and_what_was_not_verified(folder):
    if folder.name not in PUBLISHED:
        pytest.skip("not a published checkpoint")
    text = card(folder)[1]
    assert "## Recommended settings" in text and "## Not verified here" in text and "tokenizer" in text
    table = text.split("## Recommended settings")[1].split("\n## ")[0]
    written = json.loads((folder / "generation_config.json").read_text())
    for name in set(written) - {"mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}:
        assert f"`{name}`" in table, f"the table does not say where {name} comes from"
