"""What published checkpoints say and leave out, and what stands on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from dllm_hf import SDARConfig, SDARForCausalLM, SDARModel, SDARMoeConfig, SDARMoeForCausalLM, SDARMoeModel

from ..builders import sdar_config, sdar_moe_config

GOLDEN = Path(__file__).parent.parent / "golden"
CLASSES = {
    "sdar": (SDARConfig, SDARModel, SDARForCausalLM),
    "sdar_moe": (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM),
}


@pytest.fixture
def folder(family) -> Path:
    return GOLDEN / f"{family}-b4"


@pytest.fixture
def published(folder, tmp_path):
    """A copy of the folder whose config.json the test may change: `published(name=value, other=None)`."""

    def write(**changes) -> Path:
        shutil.copytree(folder, tmp_path / "copy")
        values = json.loads((folder / "config.json").read_text()) | changes
        values = {name: value for name, value in values.items() if value is not None}
        path = tmp_path / "copy" / "config.json"
        path.unlink()
        path.write_text(json.dumps(values))
        return tmp_path / "copy"

    return write


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def test_a_published_config_that_names_neither_block_nor_mask_means_4_and_151669(published):
    config = AutoConfig.from_pretrained(published(block_size=None, mask_token_id=None, vocab_size=151936))
    assert (config.block_size, config.mask_token_id) == (4, 151669)


def test_what_a_config_says_about_block_and_mask_counts(published):
    config = AutoConfig.from_pretrained(published(block_size=16, mask_token_id=7))
    assert (config.block_size, config.mask_token_id) == (16, 7)


def test_a_fresh_config_has_the_published_tokens(family):
    config = CLASSES[family][0]()
    assert (config.block_size, config.mask_token_id, config.pad_token_id) == (4, 151669, 151643)
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert config.head_dim == 128


def test_every_weight_is_used_and_none_is_missing(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_loading_and_saving_changes_no_byte_of_the_weights_nor_a_name(folder, tmp_path):
    """The experts of SDAR-MoE are stacked in memory and apart on disk."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    saved, original = weights(tmp_path), weights(folder)
    assert sorted(saved) == sorted(original)
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name


def test_experts_are_apart_on_disk(tmp_path):
    names = weights(GOLDEN / "sdar_moe-b4")
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in names
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "sdar_moe-b4")
    assert "model.layers.0.mlp.experts.down_proj" in dict(model.named_parameters())


def test_a_changed_expert_is_saved_and_loaded(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "sdar_moe-b4")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_the_saved_config_keeps_the_published_names(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    saved, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    passing = {"torch_dtype", "transformers_version", "auto_map"}
    missing = {name for name, value in original.items() if name not in saved and value is not None} - passing
    assert not missing
    changed = {name for name, value in original.items() if name in saved and saved[name] != value} - passing
    assert not changed
    assert saved["rope_theta"] == 1000000.0
    if saved["model_type"] == "sdar_moe":
        assert saved["num_experts"] == 8 and "num_local_experts" not in saved


def test_another_rope_theta_is_read_and_written(published, tmp_path):
    config = AutoConfig.from_pretrained(published(rope_theta=5000.0))
    assert config.rope_parameters["rope_theta"] == 5000.0
    config.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["rope_theta"] == 5000.0
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters["rope_theta"] == 5000.0


def test_a_saved_config_is_the_one_that_is_read(family, tmp_path):
    config = sdar_config(block_size=8) if family == "sdar" else sdar_moe_config(block_size=8, num_experts=6)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} or (
        AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    )


@pytest.mark.parametrize("trust", [False, True])
def test_auto_classes_find_the_classes_here_whatever_the_auto_map_says(family, folder, trust):
    config_class, base_class, lm_class = CLASSES[family]
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is config_class
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is base_class
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)) is lm_class


@torch.no_grad()
def test_the_stack_that_auto_model_gives_holds_the_checkpoint_s_weights(folder):
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    model, base = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    expected = model.model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(base(input_ids=tokens).last_hidden_state, expected, atol=0, rtol=0)


def test_the_back_end_that_training_used_is_no_wish(published):
    path = published(attn_implementation="flex_attention")
    assert AutoModelForCausalLM.from_pretrained(path).config._attn_implementation == "sdpa"
    asked = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert asked.config._attn_implementation == "eager"


def test_a_back_end_that_is_not_installed_does_not_stop_loading(published):
    path = published(attn_implementation="flash_attention_2")
    assert AutoModelForCausalLM.from_pretrained(path).config._attn_implementation == "sdpa"


def test_a_window_that_is_not_used_is_none(published):
    config = AutoConfig.from_pretrained(published(sliding_window=4096, use_sliding_window=False))
    model = AutoModelForCausalLM.from_config(config)
    assert not model.config.sliding_window
    assert not any(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers)


def test_the_tokenizer_is_qwen2_s(published):
    path = published()
    characters = "".join(chr(code) for code in range(33, 127)) + "Ġ"
    (path / "vocab.json").write_text(json.dumps({character: index for index, character in enumerate(characters)}))
    (path / "merges.txt").write_text("#version: 0.2\na b\n".replace("a b\n", ""))
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.decode(tokenizer("abc d")["input_ids"]) == "abc d"


def test_the_special_tokens_of_the_config_are_those_of_decoding(folder):
    config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (300, 301, 301)


def test_the_default_block_length_is_the_config_s_block_size(published):
    assert AutoModelForCausalLM.from_pretrained(published(block_size=7)).default_block_length == 7
