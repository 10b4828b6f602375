"""LLaDA's config and weights, in the variants that its original code knows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from dllm_hf import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig
from dllm_hf.llada import LLaDAModel

from ..builders import MASK, VOCAB, llada_config

TOKENS = torch.tensor([[3, 4, MASK, 6]])


def saved(config, folder) -> tuple[LLaDAModelLM, set[str], LLaDAModelLM]:
    """A new model, the names of its weights on disk, and what is loaded from there."""
    torch.manual_seed(0)
    model = LLaDAModelLM(config).eval()
    for parameter in model.parameters():  # biases too, which start at 0
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
    return model, names, AutoModelForCausalLM.from_pretrained(folder)


def assert_same_logits(model, loaded):
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, atol=0, rtol=0)


BLOCK = "model.transformer.blocks.0."
LINEAR = {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}


def test_weights_have_the_names_of_the_originals(tmp_path):
    _, names, _ = saved(llada_config(n_layers=1), tmp_path)
    head = {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    assert names == head | {f"{BLOCK}{name}.weight" for name in LINEAR | {"attn_norm", "ff_norm"}}


def test_the_stack_of_layers_alone_has_their_names_too(tmp_path):
    model = LLaDAModel(llada_config(n_layers=1))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
    _, with_head, _ = saved(model.config, tmp_path / "with head")
    assert names == {name.removeprefix("model.") for name in with_head} - {"transformer.ff_out.weight"}
    loaded, info = LLaDAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).last_hidden_state
        torch.testing.assert_close(loaded(input_ids=TOKENS).last_hidden_state, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "changes, biases",
    [
        ({"n_kv_heads": 2}, set()),
        ({"n_kv_heads": None, "multi_query_attention": True}, set()),
        ({"include_bias": True}, LINEAR),
        ({"include_qkv_bias": True}, {"q_proj", "k_proj", "v_proj"}),
        ({"include_bias": True, "include_qkv_bias": True}, LINEAR),
        ({"mlp_hidden_size": None, "mlp_ratio": 4}, set()),
    ],
)
def test_variants_are_saved_and_loaded(tmp_path, changes, biases):
    model, names, loaded = saved(llada_config(n_layers=1, **changes), tmp_path)
    assert {name for name in names if name.startswith(BLOCK) and name.endswith(".bias")} == {
        f"{BLOCK}{name}.bias" for name in biases
    }
    assert ("model.transformer.ff_out.bias" in names) is bool(changes.get("include_bias"))
    assert_same_logits(model, loaded)


def test_tied_weights_have_no_head_on_disk(tmp_path):
    model, names, loaded = saved(llada_config(weight_tying=True), tmp_path)
    assert "model.transformer.wte.weight" in names and "model.transformer.ff_out.weight" not in names
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_logits(model, loaded)


def test_an_embedding_larger_than_the_vocabulary_keeps_its_size(tmp_path):
    config = llada_config(vocab_size=VOCAB - 6, embedding_size=VOCAB)
    model, _, loaded = saved(config, tmp_path)
    assert loaded.lm_head.weight.shape[0] == loaded.model.embed_tokens.weight.shape[0] == VOCAB
    assert json.loads((tmp_path / "config.json").read_text())["embedding_size"] == VOCAB
    assert_same_logits(model, loaded)


def test_without_a_size_the_feed_forward_layer_has_the_ratios():
    assert llada_config(d_model=32, mlp_hidden_size=None, mlp_ratio=4).intermediate_size == 128


def test_the_defaults_are_those_of_llada_8b():
    config = LLaDAConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (4096, 32, 32)
    assert (config.vocab_size, config.intermediate_size) == (126464, 12288)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (126336, 126081, 126348)


def test_the_librarys_names_read_and_write_the_originals():
    config = llada_config()
    config.num_attention_heads = 8
    assert config.n_heads == 8
    assert (config.hidden_size, config.max_position_embeddings) == (config.d_model, config.max_sequence_length)


def test_the_original_keys_stay_on_disk(tmp_path):
    llada_config(rope_theta=1e4).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert {"d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "max_sequence_length"} <= set(values)
    assert values["rope_theta"] == 1e4
    assert not {"hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"} & set(values)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1e4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["LLaDAMoEModelLM"]}, "LLaDA-MoE"),
        ({"num_experts": 64}, "LLaDA-MoE"),
        ({"alibi": True}, "alibi"),
        ({"rope": False}, "rope"),
        ({"block_type": "sequential"}, "block_type"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"attention_layer_norm": True}, "attention_layer_norm"),
        ({"scale_logits": True}, "scale_logits"),
        ({"input_emb_norm": True}, "input_emb_norm"),
        ({"block_group_size": 2}, "block_group_size"),
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        llada_config(**changes)


def test_a_llada_moe_folder_is_not_loaded_as_a_llada():
    folder = Path(__file__).parents[1] / "golden" / "llada_moe-mha"
    assert type(LLaDAConfig.from_pretrained(folder)) is LLaDAMoEConfig
    with pytest.raises(ValueError, match="LLaDA-MoE.*LLaDAMoEModelLM"):
        LLaDAModelLM.from_pretrained(folder)
