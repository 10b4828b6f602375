"""GGUF: what an exported file holds, read by the package `gguf`, without llama.cpp."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_hf import SDARForCausalLM
from dllm_hf_cli import main

from ..builders import MASK, character_tokenizer, new_model
from .comparing import CHECKPOINTS, GOLDEN, golden

gguf = pytest.importorskip("gguf", reason='needs GGUF: pip install "dllm-hf[gguf]"')

from dllm_hf.runtimes import exporting, gguf_export  # noqa: E402
from dllm_hf.runtimes.gguf_export import export_gguf  # noqa: E402
from dllm_hf.runtimes.gguf_tokenizer import SPLITS  # noqa: E402

pytestmark = pytest.mark.slow  # exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint, and a reader of the file that it is exported to, once."""
    root = tmp_path_factory.mktemp("gguf")

    @cache
    def pair(family: str, type: str) -> tuple:
        model = golden(family)
        return model, gguf.GGUFReader(export_gguf(model, root / f"{family}-{type}", type) / "model.gguf")

    return pair


def tensors(reader) -> dict[str, np.ndarray]:
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def value(reader, key: str):
    return reader.fields[key].contents()


def interleaved(rows: torch.Tensor, heads: int) -> np.ndarray:
    """Rows of a projection to heads, of which each has the two halves of its rotation interleaved."""
    halves = rows.view(heads, 2, -1, rows.shape[-1])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(rows.shape).numpy()


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_every_weight_is_there_once(exported, family):
    model, reader = exported(family, "f32")
    weights, found = model.state_dict(), tensors(reader)
    assert len(found) == len(weights)
    layer, block = "model.layers.1.", "blk.1."
    query = weights[f"{layer}self_attn.q_proj.weight"]
    query = interleaved(query, 4) if family == "llada" else query.numpy()
    assert np.array_equal(found[f"{block}attn_q.weight"], query)
    same = {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up"}
    same |= {"self_attn.o_proj": "attn_output", "self_attn.v_proj": "attn_v", "input_layernorm": "attn_norm"}
    names = {f"{layer}{ours}": f"{block}{theirs}" for ours, theirs in same.items()}
    names |= {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    for ours, theirs in names.items():
        assert np.array_equal(found[f"{theirs}.weight"], weights[f"{ours}.weight"].numpy()), ours
    if family == "dream":
        assert np.array_equal(found["blk.0.attn_k.bias"], weights["model.layers.0.self_attn.k_proj.bias"].numpy())


@pytest.mark.parametrize("family, pair", [("llada", "llada llama"), ("dream", "dream qwen2"), ("sdar", "qwen3 qwen3")])
def test_one_file_is_of_both_architectures_of_a_family(exported, family, pair):
    """The one that llama.cpp decodes by diffusion, and the one that has a cache there."""
    model, reader = exported(family, "f32")
    first, second = pair.split()
    assert value(reader, "general.architecture") == first
    for name in (first, second):
        assert value(reader, f"{name}.embedding_length") == 64
        assert value(reader, f"{name}.attention.causal") is False
        assert value(reader, f"{name}.rope.freq_base") == model.config.rope_parameters["rope_theta"]
    assert value(reader, "tokenizer.ggml.mask_token_id") == 300
    assert value(reader, "diffusion.shift_logits") is (family == "dream")


@pytest.mark.parametrize("type, size, error", [("f16", 0.55, 1e-3), ("q8_0", 0.33, 1 / 250)])
def test_smaller_types_are_close(exported, type, size, error):
    """8 bits: half a step of the 127 that the largest of 32 weights has; rows that are no multiple of 32 are in 16 bits."""
    model, reader = exported("dream", type)
    total = lambda reader: sum(each.n_bytes for each in reader.tensors)
    assert total(reader) < size * total(exported("dream", "f32")[1])
    found, expected = tensors(reader), tensors(exported("dream", "f32")[1])
    for name, weight in expected.items():
        assert np.abs(found[name] - weight).max() <= error * np.abs(weight).max(), name
    types = {each.name: each.tensor_type.name for each in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == "F32"
    assert types["blk.0.ffn_down.weight"] == "F16"  # 144 columns
    assert types["token_embd.weight"] == types["output.weight"] == type.upper()


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path):
    export_gguf(new_model("dream", tie_word_embeddings=True), tmp_path / "out", "f32")
    found = tensors(gguf.GGUFReader(tmp_path / "out" / "model.gguf"))
    assert "output.weight" not in found and "token_embd.weight" in found


# --- the tokenizer


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast):
    tokenizer.save_pretrained(folder)
    model = new_model("llada")
    model.config._name_or_path = str(folder)
    return model


def byte_level_tokenizer(pattern: str | None, normalizer=None) -> PreTrainedTokenizerFast:
    vocabulary = {text: index for index, text in enumerate(["a", "b", "Ġ", "ab", "Ġab", "ä"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "ab")]))
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template="{{ messages }}")


@pytest.mark.parametrize("pattern, name", [*SPLITS.items(), (None, "gpt-2")])
def test_a_byte_level_tokenizer_is_in_the_file(tmp_path, pattern, name):
    export_gguf(with_tokenizer(tmp_path / "source", byte_level_tokenizer(pattern)), tmp_path / "out", "f32")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert value(reader, "tokenizer.ggml.pre") == name
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert tokens[:8] == ["a", "b", "Ġ", "ab", "Ġab", "ä", "<end>", "[PAD7]"] and len(tokens) == 64
    assert types[:8] == [1, 1, 1, 1, 1, 1, 3, 5]
    assert value(reader, "tokenizer.ggml.merges") == ["a b", "Ġ ab"]
    assert value(reader, "tokenizer.chat_template") == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_tokenizer_of_characters_is_in_the_file(tmp_path):
    vocabulary = {**character_tokenizer().get_vocab(), "é": 0}
    del vocabulary["a"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>")
    export_gguf(with_tokenizer(tmp_path / "source", tokenizer), tmp_path / "out", "f32")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert tokens[vocabulary["b"]] == "b" and tokens[vocabulary[" "]] == "Ġ" and tokens[MASK] == "<mask>"
    assert tokens[0] == "Ã©" and value(reader, "tokenizer.ggml.merges") == ["Ã ©"]


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    other = with_tokenizer(tmp_path / "split", byte_level_tokenizer(r"\d+"))
    with pytest.raises(ValueError, match="no byte-level BPE that splits texts as one that llama.cpp knows .*qwen2"):
        export_gguf(other, tmp_path / "out", "f32")
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2}, unk_token="<unk>"))
    other = with_tokenizer(tmp_path / "words", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    with pytest.raises(ValueError, match="is a WordLevel, which cannot be written to GGUF"):
        export_gguf(other, tmp_path / "out", "f32")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_repository_of_the_hub_is_in_the_file(tmp_path, monkeypatch):
    model = with_tokenizer(tmp_path / "source", byte_level_tokenizer(None))
    model.config._name_or_path = "org/name"
    monkeypatch.setattr(exporting, "fetch", {"org/name": tmp_path / "source"}.get)
    export_gguf(model, tmp_path / "out", "f32")
    assert value(gguf.GGUFReader(tmp_path / "out" / "model.gguf"), "tokenizer.ggml.pre") == "gpt-2"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_checkpoint_without_a_tokenizer_is_warned_of(tmp_path, monkeypatch, caplog):
    character_tokenizer().save_pretrained(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")  # whose tokenizer is not the model's
    model = new_model("llada")
    export_gguf(model, tmp_path / "out", "f32")
    assert not caplog.text and not (tmp_path / "out" / "tokenizer.json").exists()
    model.config._name_or_path = str(tmp_path / "gone")
    export_gguf(model, tmp_path / "other", "f32")
    assert "gone has no tokenizer that can be read: the export has none either" in caplog.text
    assert value(gguf.GGUFReader(tmp_path / "other" / "model.gguf"), "tokenizer.ggml.model") == "no_vocab"


def test_a_normalizer_is_warned_of(tmp_path, caplog):
    tokenizer = byte_level_tokenizer(None, normalizers.Lowercase())
    export_gguf(with_tokenizer(tmp_path / "source", tokenizer), tmp_path / "out", "f32")
    assert "llama.cpp has no normalizers" in caplog.text


# --- the command


def test_the_command_writes_a_folder(tmp_path, capsys):
    arguments = ["export-gguf", str(GOLDEN / "dream-gqa"), str(tmp_path / "out"), "--type", "f16"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"Written: {tmp_path / 'out'}\n"
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "config.json", "generation_config.json", "dllm_hf_gguf.json"}
    assert main(arguments) == 2 and "there already" in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    "family, reason", [("gla_dream", "recurrent states"), ("sdar_moe", "experts"), ("llada_moe", "experts")]
)
def test_families_that_it_does_not_write_are_refused_by_name(tmp_path, family, reason):
    model = new_model(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*{reason}"):
        export_gguf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"include_bias": True}, "bias that llama.cpp does not read"),
        ({"mask_token_id": None}, "no `mask_token_id`"),
        ({"activation_type": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export_gguf(new_model("llada", **changes), tmp_path / "out", "f32")
    assert not list(tmp_path.iterdir())


def test_a_sliding_window_is_refused(tmp_path):
    model = new_model("dream", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="use_sliding_window=True"):
        export_gguf(model, tmp_path / "out", "f32")


def test_an_unknown_type_and_a_folder_that_is_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="type='q3'.*q4_k_m"):
        export_gguf(new_model("dream"), tmp_path / "out", "q3")
    with pytest.raises(ValueError, match="there already"):
        export_gguf(new_model("dream"), tmp_path)


@pytest.mark.parametrize("package, extra", [("gguf", "gguf"), ("llama_cpp", "llama-cpp")])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'`{package}`.*pip install "dllm-hf\[{extra}\]"'):
        export_gguf(new_model("dream"), tmp_path / "out", "q4_k_m")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error):
    written = gguf_export._tensors

    def fail(model):
        for number, each in enumerate(written(model)):
            if number == 5 and any(tmp_path.rglob("model.gguf")):
                raise error
            yield each

    monkeypatch.setattr(gguf_export, "_tensors", fail)
    with pytest.raises(error):
        export_gguf(new_model("dream"), tmp_path / "out", "f32")
    assert not list(tmp_path.iterdir())


def test_small_projections_before_norms_that_change_nothing_are_in_bfloat16(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=None))
    llama.save_pretrained(tmp_path / "llama")
    model = SDARForCausalLM.from_ar_pretrained(tmp_path / "llama", mask_token_id=MASK)
    for type, is_exact in (("f32", True), ("f16", False), ("q8_0", False)):
        found = tensors(gguf.GGUFReader(export_gguf(model, tmp_path / type, type) / "model.gguf"))
        for name, theirs in (("q", "attn_q"), ("k", "attn_k")):
            weight = model.state_dict()[f"model.layers.0.self_attn.{name}_proj.weight"]
            weight = weight if is_exact else weight.bfloat16().float()
            assert np.array_equal(found[f"blk.0.{theirs}.weight"], weight.numpy())
    with pytest.raises(ValueError, match="`type='q4_k_m'`: take 'q8_0'"):
        export_gguf(model, tmp_path / "q4", "q4_k_m")
