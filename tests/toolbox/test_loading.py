"""`from_pretrained` and `save_pretrained`: where weights go, in which type, and in how many files."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..builders import BUILDERS
from .conftest import decoded, logits_of


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_places_the_model_and_changes_nothing(model, folder, device_map):
    pytest.importorskip("accelerate")
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("it would be placed on the GPU")
    loaded = load(folder, device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0, rtol=0)


def test_layers_on_disk_give_the_same_logits_and_tokens(model, folder, tmp_path):
    pytest.importorskip("accelerate")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = load(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    assert {parameter.device.type for parameter in loaded.model.layers[1].parameters()} == {"meta"}
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0, rtol=0)
    assert decoded(loaded) == decoded(model)


def test_a_layer_is_never_split_between_devices(model):
    accelerate = pytest.importorskip("accelerate")
    sizes = accelerate.utils.compute_module_sizes(model)
    # Room for a layer and a half: the rest goes to the disk.
    smaller, larger = sorted((sizes["model.layers.0"], sizes["model.layers.1"]))
    room = sizes["model.embed_tokens"] + larger + smaller // 2
    options = {"max_memory": {"cpu": room}, "no_split_module_classes": list(model._no_split_modules)}
    places = accelerate.infer_auto_device_map(model, **options)
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if re.match(r"model\.layers\.\d+\.", name)]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=str)
def test_the_type_is_what_was_asked_for(model, folder, name, dtype):
    loaded = load(folder, **{name: dtype})
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    difference = (logits_of(loaded) - logits_of(model)).abs().median() / logits_of(model).std()
    assert 0 < difference < 0.05
    decoded(loaded)


def test_the_type_of_the_file_is_kept_where_nothing_is_asked_for(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("low", [False, True])
def test_low_cpu_mem_usage_changes_nothing(model, folder, low):
    torch.testing.assert_close(logits_of(load(folder, low_cpu_mem_usage=low)), logits_of(model), atol=0, rtol=0)


def test_shards_hold_every_weight_once_and_load_again(model, tmp_path):
    from safetensors import safe_open

    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    names = {}
    for kind in ("one", "many"):
        files = sorted((tmp_path / kind).glob("*.safetensors"))
        names[kind] = [name for file in files for name in safe_open(file, "pt").keys()]
        assert (len(files) > 2) == (kind == "many")
    assert sorted(names["many"]) == sorted(names["one"])
    loaded, info = load(tmp_path / "many", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0, rtol=0)


def test_a_model_on_meta_holds_nothing_until_it_is_loaded(family, model):
    with torch.device("meta"):
        empty = BUILDERS[family]()
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
