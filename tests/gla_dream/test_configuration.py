"""The document's example, the configuration, and what stands on disk."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from dllm_hf import GLADreamConfig, GLADreamModel, GLADreamTokenizer

from ..builders import MASK, VOCAB, gla_dream_config, new_model

ROW = [3, 4, MASK, 6, 7, MASK, 9, 10, 11, 12, 13]


def test_the_document_s_example_runs_as_it_is_written():
    config = GLADreamConfig(
        vocab_size=151936,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        block_size=32,
        expand_k=1,
        expand_v=1,
    )
    model = GLADreamModel(config)
    input_ids = torch.randint(0, 151643, (1, 40))
    labels = input_ids.clone()
    outputs = model(input_ids, labels=labels)
    assert outputs.loss.isfinite() and outputs.logits.shape == (1, 40, 151936)
    generated = model.generate(input_ids, max_length=50, threshold=0.9)
    assert generated.shape == (1, 50)
    assert torch.equal(generated[:, :40], input_ids) and not (generated == config.mask_token_id).any()


def test_the_defaults_are_the_document_s():
    config = GLADreamConfig()
    assert (config.block_size, config.expand_k, config.expand_v) == (32, 1, 1)
    assert (config.inter_block_injection_mode, config.share_inter_intra_gate_weights) == ("global", False)
    assert (config.use_complementary_mask, config.logits_shift, config.attn_mode) == (False, 0, "auto")
    # Dream's tokens.
    assert (config.mask_token_id, config.pad_token_id, config.eos_token_id) == (151666, 151643, 151643)


@pytest.fixture
def folder(tmp_path):
    """A saved model, and the model."""
    model = new_model("gla_dream", block_size=8, inter_block_injection_mode="boundary", expand_v=1.5, logits_shift=1)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_saved_configuration_is_the_one_that_is_read(folder):
    path, model = folder
    config = AutoConfig.from_pretrained(path)
    assert type(config) is GLADreamConfig
    passing = {"_name_or_path", "dtype", "architectures", "transformers_version"}
    read, saved = ({k: v for k, v in c.to_dict().items() if k not in passing} for c in (config, model.config))
    assert read == saved


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@torch.no_grad()
def test_auto_classes_load_the_same_model(folder, auto):
    path, model = folder
    loaded, info = auto.from_pretrained(path, output_loading_info=True)
    assert type(loaded) is GLADreamModel
    assert not any(info.values()), info
    tokens = torch.tensor([ROW])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_tied_embeddings_are_saved_once(tmp_path):
    model = new_model("gla_dream", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_tokenizer_is_dream_s(tmp_path):
    gla_dream_config().save_pretrained(tmp_path)
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GLADreamTokenizer"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, GLADreamTokenizer) and isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.decode(tokenizer("abc d")["input_ids"]) == "abc d"
    tokenizer.save_pretrained(tmp_path / "again")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "again"), GLADreamTokenizer)


@pytest.mark.parametrize(
    "change, mentions",
    [
        ({"inter_block_injection_mode": "local"}, "`inter_block_injection_mode='local'`.*global, boundary"),
        ({"attn_mode": "parallel"}, "`attn_mode='parallel'`.*auto, torch, naive, chunk, fused_recurrent"),
        ({"attn_mode": "fused_chunk"}, "`attn_mode='fused_chunk'`.*use 'chunk'"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "`num_attention_heads=3`.*`hidden_size.*change one"),
        ({"expand_k": 0.3}, "`hidden_size \\* expand_k` = 32 \\* 0.3.*change one"),
        ({"expand_v": 0.3}, "`hidden_size \\* expand_v` = 32 \\* 0.3.*change one"),
        ({"expand_v": 0}, "`hidden_size \\* expand_v`.*change one"),
        ({"expand_k": 0.375}, "3 wide.*pairs.*`hidden_size \\* expand_k / num_attention_heads` even"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads=3` must divide `num_attention_heads=4`"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads=0` must be at least 1"),
        ({"head_dim": 16}, "`head_dim=16`.*leave it out, or change `expand_k`"),
        ({"block_size": 0}, "`block_size=0` must be at least 1"),
        ({"logits_shift": 2}, "`logits_shift=2` must be 0, or 1"),
        ({"gate_logit_normalizer": 0}, "`gate_logit_normalizer=0` must be above 0"),
        ({"conv_size": 4}, "`conv_size=4` must be an odd number.*or 0"),
        ({"conv_size": -3}, "`conv_size=-3` must be an odd number.*or 0"),
        ({"mask_token_id": VOCAB}, f"`mask_token_id={VOCAB}` is outside of the vocabulary"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_can(change, mentions):
    with pytest.raises(ValueError, match=mentions):
        gla_dream_config(**change)


@pytest.mark.parametrize("name", ["block_size", "expand_k", "attn_mode", "logits_shift", "conv_size"])
def test_a_value_of_another_type_is_refused_by_name(name):
    with pytest.raises(Exception, match=name):
        gla_dream_config(**{name: [4]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("conv_size", [0, 3])
@torch.no_grad()
def test_it_runs_in_every_precision(dtype, conv_size):
    model, tokens = new_model("gla_dream", conv_size=conv_size), torch.tensor([ROW * 5])
    expected = model(tokens).logits
    logits = model.to(dtype)(tokens).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    assert (logits - expected).norm() < 0.2 * expected.norm()  # weights this large make much of a rounding
