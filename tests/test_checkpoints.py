"""Original checkpoints load by their own names, and what is saved is what was loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dllm_hf import (
    DreamConfig,
    DreamModel,
    Fast_dLLM_QwenConfig,
    Fast_dLLM_QwenForCausalLM,
    Fast_dLLM_QwenModel,
    LLaDA2MoeConfig,
    LLaDA2MoeModel,
    LLaDA2MoeModelLM,
    LLaDAConfig,
    LLaDAModelLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    NemotronLabsDiffusionConfig,
    NemotronLabsDiffusionModel,
)

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = {
    "llada-mha": (LLaDAConfig, LLaDAModelLM, LLaDAModelLM),
    "llada_moe-mha": (LLaDAMoEConfig, LLaDAMoEModelLM, LLaDAMoEModelLM),
    "llada2_moe-grouped": (LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM),
    "dream-gqa": (DreamConfig, DreamModel, DreamModel),
    "nemotron_labs_diffusion-gqa": (
        NemotronLabsDiffusionConfig,
        NemotronLabsDiffusionModel,
        NemotronLabsDiffusionModel,
    ),
    "fast_dllm_v2-gqa": (Fast_dLLM_QwenConfig, Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM),
}
# What an original config.json holds beyond the architecture: about how it was made and read, or never read at all.
PASSING = {"torch_dtype", "transformers_version", "auto_map", "sliding_window", "attn_implementation"}


@pytest.fixture(params=FAMILIES)
def folder(request) -> Path:
    return GOLDEN / request.param


def weights(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in path.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
    return tensors


def assert_same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_every_weight_of_an_original_is_used_and_none_is_missing(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_loading_and_saving_changes_no_byte_of_the_weights_nor_a_name(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert_same_bytes(weights(tmp_path), weights(folder))


def test_nor_does_it_in_shards(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(weights(folder))
    assert_same_bytes(weights(tmp_path), weights(folder))
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert_same_bytes(weights(tmp_path / "again"), weights(folder))


def test_nor_does_it_in_bfloat16(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    expected = weights(folder)
    # Biases by which experts are chosen stay as they are: rounded, they would choose others.
    expected |= {name: each.to(torch.bfloat16) for name, each in expected.items() if "expert_bias" not in name}
    assert_same_bytes(weights(tmp_path), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_the_saved_config_holds_the_original_keys_and_values(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    saved, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    missing = {name: value for name, value in original.items() if name not in saved and name not in PASSING}
    # Left out are switches of the original code at the only value that is supported, or None.
    assert not {name for name, value in missing.items() if value is not None}, missing
    changed = {name: (value, saved[name]) for name, value in original.items() if name in saved and saved[name] != value}
    assert not set(changed) - PASSING, changed


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_auto_classes_find_the_class_here_whatever_the_auto_map_says(folder, auto, trust):
    config_class, base_class, model_class = FAMILIES[folder.name]
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is config_class
    expected = base_class if auto is AutoModel else model_class
    assert type(auto.from_pretrained(folder, trust_remote_code=trust)) is expected


def test_a_generation_config_that_was_saved_is_read(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.steps = 7
    model.generation_config.remasking_strategy = "random"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert type(loaded) is type(model.generation_config)
    assert (loaded.steps, loaded.remasking_strategy) == (7, "random")


def test_a_folder_without_generation_config_gives_the_special_tokens_of_the_config(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert (model.generation_config.mask_token_id, model.generation_config.eos_token_id) == (300, 301)
