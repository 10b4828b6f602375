"""A GLADream that starts from an autoregressive Qwen2, Qwen3 or Llama."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dllm_hf import GLADreamConfig, GLADreamModel

from ..builders import MASK, VOCAB, generate

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 61}
SIZES |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 62, "pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
# Qwen3's heads are not `hidden_size / num_attention_heads` wide.
CLASSES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM, {}), "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12})}
CLASSES |= {"llama": (LlamaConfig, LlamaForCausalLM, {})}


def save(path, kind: str, **changes):
    """A tiny model of that kind, written to a folder."""
    config_class, model_class, own = CLASSES[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **own, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(path)
    return model


@pytest.fixture(params=["qwen2", "qwen3", "llama"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def tied(request) -> bool:
    return request.param


@pytest.fixture
def started(tmp_path, kind, tied):
    """The autoregressive model, the GLADream that starts from it, and the lists of parameters."""
    original = save(tmp_path, kind, tie_word_embeddings=tied)
    return original, *start(tmp_path, output_loading_info=True)


def start(path, **kwargs):
    return GLADreamModel.from_ar_pretrained(path, **{"mask_token_id": MASK, **kwargs})


def test_what_is_copied_is_equal(started):
    original, model, info = started
    given, own = original.state_dict(), model.state_dict()
    assert info["copied"]
    for name in info["copied"]:
        assert torch.equal(own[name], given[name]), name


def test_the_lists_are_complete_and_disjoint(started):
    original, model, info = started
    assert info["copied"] + info["new"] == sorted(
        info["copied"] + info["new"], key=(info["copied"] + info["new"]).index
    )
    assert sorted(info["copied"] + info["new"]) == sorted(model.state_dict())
    assert sorted(info["copied"] + info["left_out"]) == sorted(original.state_dict())


def test_what_is_new_are_decays_gates_and_the_norm_of_the_heads(started, kind):
    _, model, info = started
    new = ["g_proj.weight", "gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias", "g_norm_swish_gate.weight"]
    new += ["intra_gate_proj.weight", "inter_gate_proj.weight"]
    assert info["new"] == sorted(f"model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in new)
    norms = [f"model.layers.{index}.self_attn.{name}_norm.weight" for index in (0, 1) for name in "qk"]
    assert info["left_out"] == (sorted(norms) if kind == "qwen3" else [])
    assert all(model.state_dict()[name].isfinite().all() for name in info["new"])


def test_what_is_not_a_weight_is_taken_over_as_well(started, kind, tied):
    original, model, _ = started
    config = model.config
    for name in ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "eos_token_id", "bos_token_id"):
        assert getattr(config, name) == getattr(original.config, name), name
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.head_dim == (12 if kind == "qwen3" else 8)
    assert (config.logits_shift, config.mask_token_id, config.pad_token_id) == (1, MASK, 61)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings == tied


def test_it_decodes(started):
    _, model, _ = started
    output = generate(model, [[1, 2, 3], [4]], max_new_tokens=6)
    assert output.sequences.shape == (2, 9) and MASK not in output.sequences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_saved_and_loaded(tmp_path, kind, tied, dtype):
    save(tmp_path / "original", kind, tie_word_embeddings=tied)
    model = start(tmp_path / "original", dtype=dtype).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is GLADreamModel and loaded.dtype == dtype
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("asked", [{}, {"dtype": torch.float32}, {"dtype": torch.float16}], ids=str)
def test_its_type_is_the_one_asked_for_and_else_the_checkpoint_s(tmp_path, kind, asked):
    save(tmp_path, kind).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = asked.get("dtype", torch.bfloat16)
    assert {parameter.dtype for parameter in start(tmp_path, **asked).parameters()} == {expected}


@torch.no_grad()
def test_with_nothing_attended_to_it_says_what_the_original_says(started):
    """Whatever is not attention computes the same."""
    original, model, _ = started
    for layer in (*original.model.layers, *model.model.layers):
        layer.self_attn.o_proj.weight.zero_()
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens).logits, original(tokens).logits, atol=1e-5, rtol=1e-5)


def test_fields_replace_what_would_be_taken_over(tmp_path, kind):
    save(tmp_path, kind)
    changes = {"block_size": 8, "inter_block_injection_mode": "boundary", "num_hidden_layers": 1, "logits_shift": 0}
    model, info = start(tmp_path, output_loading_info=True, **changes)
    assert {name: getattr(model.config, name) for name in changes} == changes
    assert any(name.startswith("model.layers.1.") for name in info["left_out"])


def test_a_configuration_may_be_given_whole_but_not_beside_fields(tmp_path, kind):
    original = save(tmp_path, kind)
    config = GLADreamConfig.from_ar_config(original.config, mask_token_id=MASK, block_size=8)
    assert GLADreamModel.from_ar_pretrained(tmp_path, config=config).config.block_size == 8
    with pytest.raises(ValueError, match="`block_size`.*`config`"):
        GLADreamModel.from_ar_pretrained(tmp_path, config=config, block_size=4)


@pytest.mark.parametrize(
    "heads, head_dim", [(3, 10), (5, 6), (5, 10)], ids=["just below", "just below again", "just above"]
)
def test_heads_of_any_width_fit(tmp_path, heads, head_dim):
    """Also where the width of all heads together, divided by `hidden_size` and multiplied by it, is no integer."""
    changes = {"hidden_size": 22, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": head_dim}
    save(tmp_path, "qwen3", **changes)
    assert start(tmp_path).config.head_dim == head_dim


# --- what is refused


@pytest.mark.parametrize(
    "change, name",
    [({"intermediate_size": 96}, "mlp"), ({"expand_k": 2}, "[qk]_proj"), ({"expand_v": 2}, "[vo]_proj")],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_with_the_parameter_s_name(tmp_path, kind, change, name):
    save(tmp_path, kind)
    with pytest.raises(ValueError, match=f"`model.layers.*{name}.*in the checkpoint: leave"):
        start(tmp_path, **change)


def test_a_vocabulary_without_the_usual_mask_token_needs_one(tmp_path, kind):
    save(tmp_path, kind)
    with pytest.raises(ValueError, match="`mask_token_id` is missing|`mask_token_id=15166[69]` is outside"):
        GLADreamModel.from_ar_pretrained(tmp_path)


def test_a_mask_that_ends_texts_is_refused_before_anything_is_trained(tmp_path, kind):
    original = save(tmp_path, kind)
    original.generation_config.eos_token_id = [3, MASK]
    original.generation_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`mask_token_id={MASK}` is also an `eos_token_id`: give"):
        start(tmp_path)
