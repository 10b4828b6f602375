"""Dream's config and tokenizer."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dllm_hf import DreamConfig, DreamModel, DreamTokenizer

from ..builders import MASK, dream_config


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A tokenizer as the published repositories hold it: `vocab.json`, `merges.txt` and the original's class name."""
    letters = list(bytes_to_unicode().values())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    words = letters + [merge.replace(" ", "") for merge in merges]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = dict(enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"], start=len(words)))
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(i): {
                "content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True
            }
            for i, text in added.items()
        },
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 131072,
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    dream_config(vocab_size=320).save_pretrained(tmp_path)
    return tmp_path


def test_the_originals_tokenizer_class_resolves_to_qwen2s(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert isinstance(tokenizer, Qwen2Tokenizer) and isinstance(tokenizer, DreamTokenizer)
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (261, 264)


def test_text_comes_back_as_it_was(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in ("hello world", " two  spaces\nand a line", "Ünïcödé 世界 🙂", "a <|mask|> b<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("hello")["input_ids"] == [259]
    assert 264 in tokenizer("a <|mask|> b")["input_ids"]


def test_a_saved_tokenizer_is_loaded_again(tokenizer_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert isinstance(again, DreamTokenizer)
    assert again("hello <|mask|>")["input_ids"] == tokenizer("hello <|mask|>")["input_ids"]


def test_queries_keys_and_values_have_biases_the_output_has_none(tmp_path):
    DreamModel(dream_config(num_hidden_layers=1)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
    assert {name for name in names if name.endswith(".bias")} == {
        f"model.layers.0.self_attn.{name}.bias" for name in ("q_proj", "k_proj", "v_proj")
    }
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names


def test_tied_weights_have_no_head_on_disk(tmp_path):
    model = DreamModel(dream_config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert "lm_head.weight" not in set(opened.keys())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.tensor([[3, MASK]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=0, rtol=0)


def test_the_defaults_are_those_of_dream_7b():
    config = DreamConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (3584, 28, 4)
    assert (config.vocab_size, config.intermediate_size) == (152064, 18944)
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert (config.mask_token_id, config.pad_token_id, config.eos_token_id) == (151666, 151643, 151643)


def test_rope_theta_is_read_and_stays_on_disk(tmp_path):
    dream_config(rope_theta=1e4).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 1e4
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1e4
