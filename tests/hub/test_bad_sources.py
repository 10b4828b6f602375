"""What cannot be exported is refused with what to do about it, before anything is written."""

import importlib
import json
import os
import shutil

import huggingface_hub.constants
import pytest

from dllm_hf.hub import export
from dllm_hf.hub.bundle import BundleError

from ..builders import BUILDERS
from .spoiling import change, everything, refusal

exporting = importlib.import_module("dllm_hf.hub.export")  # as an attribute of `dllm_hf.hub` it is the function


# Configurations


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', "\x00", "[" * 100_000], ids=lambda text: text[:9])
def test_a_configuration_that_is_none_is_refused(source, text):
    (source / "config.json").write_text(text)
    assert "config.json" in refusal(source)


def test_a_configuration_that_is_no_text_is_refused(source):
    (source / "config.json").write_bytes(b"\xff\xfe{")
    assert "config.json" in refusal(source)


def test_a_folder_without_a_configuration_is_refused(source):
    (source / "config.json").unlink()
    assert "has no config.json" in refusal(source)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "", None, 5, ["llada"], {"a": 1}, "LLaDA", "auto", "../llada"])
def test_a_model_type_that_is_none_of_ours_is_refused_with_the_list_of_ours(source, model_type):
    change(source / "config.json", model_type=model_type)
    message = refusal(source)
    assert all(name in message for name in ("llada", "Dream", "sdar", "sdar_moe", "gla_dream"))


def test_a_model_type_that_is_not_given_is_refused_as_well(source):
    config = json.loads((source / "config.json").read_text())
    del config["model_type"]
    (source / "config.json").write_text(json.dumps(config))
    assert "none of the families" in refusal(source)


@pytest.mark.parametrize(
    "names", [["DreamModel"], ["Evil"], ["LLaDAModelLM", "Evil"], "DreamModel", [None], [["x"]], 5, {"a": 1}]
)
def test_an_architecture_that_we_do_not_have_is_refused(source, names):
    change(source / "config.json", architectures=names)
    message = refusal(source)
    assert "config.json" in message


def test_what_only_looks_alike_is_refused_by_name_with_what_to_do(sources, source, tmp_path):
    auto_map = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
    change(source / "config.json", model_type="llama", architectures=None, auto_map=auto_map)
    assert "Stable-DiffCoder" in (message := refusal(source)) and "trust_remote_code" in message
    routed = shutil.copytree(sources / "llada2", tmp_path / "routed")
    change(routed / "config.json", expert_capacity=48)
    assert "LLaDA2.2" in (message := refusal(routed)) and "Load LLaDA2.0 or 2.1" in message
    change(source / "config.json", model_type="llada_moe", auto_map=None)
    assert "llada_moe" in refusal(source)


IMPOSSIBLE = [
    ("llada", {"d_model": -32}),
    ("llada", {"d_model": 0}),
    ("llada", {"d_model": 33}),
    ("llada", {"d_model": 10**30}),
    ("llada", {"d_model": "32"}),
    ("llada", {"d_model": None}),
    ("llada", {"d_model": 32.5}),
    ("llada", {"d_model": [32]}),
    ("llada", {"n_heads": 0}),
    ("llada", {"n_heads": -4}),
    ("llada", {"n_heads": 5}),
    ("llada", {"n_kv_heads": 0}),
    ("llada", {"n_kv_heads": 3}),
    ("llada", {"n_layers": -1}),
    ("llada", {"mlp_hidden_size": -1}),
    ("llada", {"embedding_size": -1}),
    ("llada", {"embedding_size": 0}),
    ("llada", {"embedding_size": 65}),
    ("llada", {"embedding_size": None, "vocab_size": 65}),
    ("llada", {"embedding_size": None, "vocab_size": 63}),
    ("llada", {"n_layers": 3}),
    ("llada", {"mlp_hidden_size": 50}),
    ("llada", {"max_sequence_length": "long"}),
    ("llada", {"alibi": True}),
    ("dream", {"hidden_size": -32}),
    ("dream", {"hidden_size": 64}),
    ("dream", {"num_attention_heads": 0}),
    ("dream", {"num_attention_heads": 5}),
    ("dream", {"num_key_value_heads": 0}),
    ("dream", {"num_key_value_heads": 3}),
    ("dream", {"vocab_size": 65}),
    ("dream", {"hidden_act": "nothing"}),
    ("dream", {"rope_scaling": {"rope_type": "nothing"}}),
    ("sdar", {"num_attention_heads": 0}),
    ("sdar", {"num_key_value_heads": 0}),
    ("sdar", {"num_key_value_heads": 3}),
    ("sdar", {"head_dim": -1}),
    ("sdar", {"head_dim": 0}),
    ("sdar", {"block_size": 0}),
    ("sdar", {"block_size": -4}),
    ("sdar", {"vocab_size": 65}),
    ("sdar_moe", {"num_experts": -1}),
    ("sdar_moe", {"num_experts_per_tok": 5}),
    ("sdar_moe", {"num_experts_per_tok": 0}),
    ("sdar_moe", {"moe_intermediate_size": -1}),
    ("sdar_moe", {"vocab_size": 65}),
    ("gla_dream", {"num_attention_heads": 0}),
    ("gla_dream", {"num_key_value_heads": 3}),
    ("gla_dream", {"block_size": 0}),
    ("gla_dream", {"hidden_size": -32}),
    ("gla_dream", {"vocab_size": 65}),
]


@pytest.mark.parametrize("family, changes", IMPOSSIBLE, ids=lambda value: str(value).replace(" ", "")[:60])
def test_sizes_of_which_no_model_can_be_built_are_refused(sources, tmp_path, family, changes):
    source = shutil.copytree(sources / family, tmp_path / "source")
    change(source / "config.json", **changes)
    assert "config.json" in refusal(source)


STRANGE = [None, True, -1, 0, 3, 1e300, float("inf"), float("nan"), 10**30, "", "x", [], [1], {}, {"x": 1}]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", BUILDERS)
def test_no_value_of_any_setting_brings_it_down(sources, tmp_path, family, turn):
    """Each is refused, or gives a repository."""
    source = shutil.copytree(sources / family, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    fallen = {}
    for number, name in enumerate(config):
        value = STRANGE[(5 * turn + number) % len(STRANGE)]
        (source / "config.json").write_text(json.dumps({**config, name: value}))
        try:
            export(str(source), tmp_path / "out", config_only=True)
            shutil.rmtree(tmp_path / "out")
        except (ValueError, OSError):
            pass
        except Exception as error:
            fallen[name, str(value)] = repr(error)[:120]
        assert {path.name for path in tmp_path.iterdir()} == {"source"}
    assert not fallen


# The files beside them

OTHERS = ["", "{", "[]", "5", "null", "\x00"]


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_file_beside_them_that_is_broken_is_refused_by_name(source, name, text):
    (source / name).write_text(text)
    assert name in refusal(source)


def test_recommended_options_that_cannot_be_used_are_refused(source):
    for options in ({"steps": "many"}, {"unheard_of": 1}, {"remasking_strategy": ["random"]}):
        (source / "generation_config.json").write_text(json.dumps(options))
        assert "generation_config.json cannot be used" in refusal(source)


# Places


def test_a_source_that_is_no_folder_is_refused(source):
    assert "is not a folder" in refusal(source / "config.json", out=source.parent / "out")
    assert "There is no folder" in refusal(source.parent / "nowhere")


def test_a_repository_that_cannot_be_reached_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no repository of that name could be read"):
        export("org/nowhere", tmp_path / "out")
    with pytest.raises(OSError, match="no repository of that name could be read"):
        export("not a name!", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "give a folder that does not exist" in refusal(source)


def test_a_file_is_not_written_over(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "give a folder that does not exist" in refusal(source)


def test_the_source_is_not_written_over(source):
    assert "give a folder that does not exist" in refusal(source, out=source)


def test_a_place_below_a_file_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    refusal(source, out=tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_where_one_may_not_write_is_refused(source, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refusal(source, out=closed / "out")


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_what_ends_it_in_the_middle_leaves_nothing_behind(source, tmp_path, monkeypatch, error, made_before):
    if made_before:
        (tmp_path / "out").mkdir()
    before = everything(tmp_path)
    copies = []

    def stop(*files):
        copies.append(shutil.copyfile(*files))
        if len(copies) == 2:
            raise error

    monkeypatch.setattr(exporting, "_link_or_copy", stop)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        export(str(source), tmp_path / "out")
    assert len(copies) == 2 and everything(tmp_path) == before
    monkeypatch.undo()
    assert (export(str(source), tmp_path / "out") / "config.json").is_file()


def test_so_does_a_module_that_cannot_be_bundled(source, tmp_path, monkeypatch):
    def refuse(*classes):
        raise BundleError("x.py:3: no")

    monkeypatch.setattr(exporting, "bundle", refuse)
    assert "x.py:3" in refusal(source)
