"""A `config.json` of which no model can be made, or not that of its weights, is refused by the value's name."""

import json
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .builders import BUILDERS, new_model

# Some names are LLaDA's own; a word that the message has to hold.
LLADA = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
LLADA |= {"num_key_value_heads": "n_kv_heads", "intermediate_size": "mlp_hidden_size"}
LLADA |= {"max_position_embeddings": "max_sequence_length"}
WRONG = [
    ("is_causal", True, "is_causal=True"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps=nan"),
    ("rms_norm_eps", 0.0, "rms_norm_eps=0.0"),
    ("rms_norm_eps", -1e-6, "rms_norm_eps=-1e-06"),
    ("rope_theta", 0, "rope_theta=0"),
    ("rope_theta", -10000.0, "rope_theta=-10000.0"),
    ("rope_theta", float("inf"), "rope_theta=inf"),
    ("rope_theta", "10000", "rope_theta='10000'"),
    ("rope_scaling", {"rope_type": "evil"}, "rope_type='evil'"),
    ("rope_scaling", {"rope_type": ["linear"]}, "rope_type=['linear']"),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}, "factor=0"),
    ("rope_scaling", {"rope_type": "linear", "factor": float("nan")}, "factor=nan"),
    ("hidden_size", 0, "=0` must be at least 1"),
    ("num_hidden_layers", 0, "=0` must be at least 1"),
    ("num_hidden_layers", -3, "=-3` must be at least 1"),
    ("num_hidden_layers", 10**9, "=1000000000`"),
    ("num_hidden_layers", 10**30, "more than 1000 layers"),
    ("num_attention_heads", 0, "=0` must be at least 1"),
    ("num_key_value_heads", 0, "=0` must be at least 1"),
    ("intermediate_size", 0, "=0` must be at least 1"),
    ("max_position_embeddings", 0, "=0` must be at least 1"),
    ("vocab_size", 0, "=0` must be at least 1"),
]
OWN = [
    ("llada", "mlp_ratio", float("nan"), "mlp_ratio=nan"),
    ("llada", "init_std", float("inf"), "init_std=inf"),
    ("sdar", "head_dim", 0, "head_dim=0"),
    ("dream", "head_dim", 0, "head_dim=0"),
    ("dream", "attention_dropout", float("nan"), "attention_dropout=nan"),
    ("sdar", "block_size", 0, "block_size=0"),
    ("sdar_moe", "num_experts", 0, "num_experts=0"),
    ("sdar_moe", "moe_intermediate_size", 0, "moe_intermediate_size=0"),
    ("sdar_moe", "router_aux_loss_coef", float("nan"), "router_aux_loss_coef=nan"),
    ("gla_dream", "block_size", 0, "block_size=0"),
    ("gla_dream", "gate_low_rank_dim", 0, "gate_low_rank_dim=0"),
    ("gla_dream", "gate_logit_normalizer", float("nan"), "gate_logit_normalizer=nan"),
    ("gla_dream", "expand_k", float("nan"), "expand_k=nan"),
    ("gla_dream", "expand_v", float("inf"), "expand_v=inf"),
    ("gla_dream", "conv_size", -1, "conv_size=-1"),
]
EVERY = [(family, *row) for family in BUILDERS for row in WRONG] + OWN


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The `config.json` of a model of each family."""
    folder = tmp_path_factory.mktemp("configs")
    for family in BUILDERS:
        new_model(family).config.save_pretrained(folder / family)
    return {family: json.loads((folder / family / "config.json").read_text()) for family in BUILDERS}


@pytest.mark.parametrize("family, name, value, says", EVERY, ids=lambda value: str(value).replace(" ", "")[:40])
def test_a_value_that_makes_no_model_is_refused_by_its_name(configs, tmp_path, family, name, value, says):
    values = dict(configs[family])
    if name == "vocab_size" and family == "llada":
        del values["embedding_size"]
    if name in ("rope_theta", "rope_scaling"):
        del values["rope_parameters"]
    written = LLADA.get(name, name) if family == "llada" else name
    (tmp_path / "config.json").write_text(json.dumps({**values, written: value}))
    start = time.process_time()
    with pytest.raises(ValueError) as refused:
        AutoConfig.from_pretrained(tmp_path)
    assert time.process_time() - start < 5  # of this process: others may keep the machine busy
    message = str(refused.value)
    assert says in message and (written in message or name == "rope_scaling")
    # What to do about it.
    assert any(words in message for words in ("correct the", "leave it out", "choose one of", "or 0 for no"))


@pytest.mark.parametrize("family", BUILDERS)
def test_what_a_configuration_writes_about_attention_is_read_again(configs, tmp_path, family):
    values = {**configs[family], "is_causal": False, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["factor"] == 2.0
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


DREAM = {"model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 3584, "num_attention_heads": 28}
DREAM |= {"num_hidden_layers": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}
SDAR = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32}
SDAR |= {"num_hidden_layers": 36, "num_key_value_heads": 8, "intermediate_size": 12288, "vocab_size": 151936}


@pytest.mark.parametrize(
    "values, name",
    [
        pytest.param({**DREAM, "mask_token_id": 151666, "rope_theta": 1000000.0}, "DreamModel", id="DiffuCoder-7B"),
        pytest.param({**DREAM, "mask_token_id": 151666}, "DreamModel", id="Dream-Coder-7B"),
        pytest.param(
            {**SDAR, "head_dim": 128, "attn_implementation": "flash_attention_2"}, "SDARForCausalLM", id="TraDo-8B"
        ),
    ],
)
def test_checkpoints_of_others_in_our_formats_load_into_the_family(values, name, tmp_path):
    """Their configurations as far as public code tells them."""
    (tmp_path / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoModel": "modeling_other.Other"}}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model).__name__ == name
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(7.9, abs=0.5)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "rnd1", "architectures": ["RND1LM"], "num_experts": 128}, "rnd1"),
        ({"model_type": "llada2_moe_veomni"}, "llada2_moe_veomni"),
        ({"model_type": "llada", "architectures": ["ILLaDAForCausalLM"], "hidden_size": 4096}, "iLLaDA"),
        ({"model_type": "llada2_moe", "expert_capacity": 48}, "LLaDA2.2"),
    ],
)
def test_checkpoints_that_are_not_ours_are_refused_on_loading(values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)
