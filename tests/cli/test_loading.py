"""What the command line refuses to decode with, and what it says about it, in one line, before it loads a weight."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..hub.conftest import in_hub_cache
from ..hub.spoiling import change, rewrite

HUB_CONFIGS = Path(__file__).parents[2] / "hub_configs"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(folder, tmp_path):
    """A saved model to spoil."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture
def chat_copy(chat_folder, tmp_path):
    return shutil.copytree(chat_folder, tmp_path / "model")


def refusal(run, folder, *arguments, command="generate") -> str:
    code, stdout, stderr = run(command, folder, *(arguments or (["Hi"] if command == "generate" else [])))
    assert (code, stdout) == (2, ""), stderr
    assert stderr.startswith("dllm-hf: error: ") and stderr.count("\n") == 1 and "Traceback" not in stderr
    return stderr


BLOCK = "model.transformer.blocks.1.ff_proj.weight"


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(run, copy):
    rewrite(copy, lambda tensors: tensors.pop(BLOCK))
    message = refusal(run, copy)
    assert str(copy) in message and "1 tensor (model.layers.1.mlp.gate_proj.weight) missing" in message
    assert "fetch both again" in message


def test_a_checkpoint_that_lacks_a_layer_is_refused(run, copy):
    rewrite(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".blocks.1." in name])
    assert "9 tensors (model.layers.1." in refusal(run, copy) and copy.exists()


def test_a_tensor_that_has_another_name_is_missing(run, copy):
    rewrite(copy, lambda tensors: tensors.update({BLOCK.replace("ff_proj", "ffproj"): tensors.pop(BLOCK)}))
    assert "model.layers.1.mlp.gate_proj.weight" in refusal(run, copy)


def test_a_tensor_of_another_shape_is_refused(run, copy):
    rewrite(copy, lambda tensors: tensors.update({BLOCK: torch.zeros(47, 32)}))
    assert "1 of another shape (model.layers.1.mlp.gate_proj.weight is (47, 32), not (48, 32))" in refusal(run, copy)


def test_tensors_that_nothing_reads_are_a_warning(run, copy, folder):
    rewrite(copy, lambda tensors: tensors.update(another=torch.zeros(3)))
    code, stdout, stderr = run("generate", copy, "Hi", "--max-new-tokens", 4)
    assert (code, stdout) == run("generate", folder, "Hi", "--max-new-tokens", 4)[:2]
    warning, _ = stderr.splitlines()
    assert warning.startswith("dllm-hf: warning: ") and "1 tensor (another)" in warning and str(copy) in warning


@pytest.mark.parametrize("layers", [0, 1, 3, 1000, 10**9])
def test_another_number_of_layers_is_not_passed_over(run, copy, layers):
    change(copy / "config.json", n_layers=layers)
    if layers == 1:  # the file holds what this model needs, and more
        code, _, stderr = run("generate", copy, "Hi", "--max-new-tokens", 4)
        assert code == 0 and "warning" in stderr and "model.layers.1." in stderr
    else:
        assert "config.json" in refusal(run, copy)


def test_sizes_far_beyond_the_weights_are_refused_without_their_memory(run, copy):
    change(copy / "config.json", d_model=2**24, mlp_hidden_size=2**24)
    assert "of another shape" in refusal(run, copy)


def test_so_are_those_of_quantised_weights(run, copy):
    changes = {"d_model": 2**24, "quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}
    change(copy / "config.json", **changes)
    message = refusal(run, copy)
    assert f"{copy / 'config.json'} describes a model of " in message and "its weights have" in message


CONFIGS = {
    "is_causal": True,
    "rms_norm_eps": float("nan"),
    "rope_theta": 0,
    "d_model": 0,
    "n_layers": 10**9,
    "rope_scaling": {"rope_type": "evil"},
    "torch_dtype": "evil",
    "max_sequence_length": "long",
    "quantization_config": [],
    "mask_token_id": 10**20,
    "model_type": "gpt2",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_configuration_is_refused_with_the_files_name(run, copy, name):
    values = json.loads((copy / "config.json").read_text())
    del values["rope_parameters"], values["dtype"]
    (copy / "config.json").write_text(json.dumps({**values, name: CONFIGS[name]}))
    assert str(copy) in refusal(run, copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', "\0", "[" * 100_000], ids=lambda text: text[:9])
def test_a_file_that_is_no_json_object_is_refused_by_its_name(run, copy, name, text):
    (copy / name).write_text(text)
    assert str(copy / name) in refusal(run, copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 5}'], ids=str)
def test_a_tokenizer_that_is_none_is_refused(run, copy, text):
    (copy / "tokenizer.json").write_text(text)
    assert f"{copy} has no tokenizer that can be read" in refusal(run, copy)


OPTIONS = [
    {"cache_policy": ["none"]},
    {"steps": "many"},
    {"temperature": float("nan")},
    {"temperature": [1]},
    {"unheard_of": 1},
    {"num_return_sequences": 10**9},
    {"eos_token_id": "x"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_that_a_generation_config_gets_wrong_is_refused_with_the_files_name(run, copy, options):
    change(copy / "generation_config.json", **options)
    message = refusal(run, copy)
    assert str(copy / "generation_config.json") in message and next(iter(options)) in message


@pytest.mark.parametrize("strategy", [["random"], {"a": 1}], ids=str)
def test_so_is_a_strategy_that_is_no_name(run, copy, strategy):
    change(copy / "generation_config.json", remasking_strategy=strategy)
    assert str(copy / "generation_config.json") in refusal(run, copy)


@pytest.mark.parametrize("part", [0, 7, 0.01, 0.5, -1])
def test_a_weights_file_that_is_cut_short_is_refused_by_its_name(run, copy, part):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: int(part * len(data)) if isinstance(part, float) else part])
    assert f"{copy / WEIGHTS} is cut short or no safetensors file" in refusal(run, copy)


def test_the_file_is_judged_that_the_library_reads(run, copy, folder):
    # Beside `model.safetensors` it does not look at an index.
    (copy / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "config.json"}}')
    arguments = ("Hi", "--max-new-tokens", 4)
    assert run("generate", copy, *arguments)[:2] == run("generate", folder, *arguments)[:2]


def test_an_adapter_is_not_taken_for_the_model_beside_it(run, copy, folder):
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": folder, "peft_type": "LORA"}))
    assert "merge it into its model" in refusal(run, copy)


def test_pickled_weights_are_not_loaded(run, copy):
    torch.save(load_file(copy / WEIGHTS), copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    assert "convert them to safetensors first" in refusal(run, copy)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_folder_of_settings_says_which_repository_has_the_weights(run, command):
    message = refusal(run, HUB_CONFIGS / "LLaDA-8B-Instruct", command=command)
    assert "settings, without weights" in message and "GSAI-ML/LLaDA-8B-Instruct" in message


def test_one_whose_card_names_none_says_what_to_give(run):
    assert "Give a folder that holds weights, or a repository" in refusal(run, HUB_CONFIGS / "GLADream")


def test_a_mistake_is_said_before_the_weights_are_read(run, copy, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("too early")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    assert "`steps=2`" in refusal(run, copy, "Hi", "--steps", 2, "--denoising-steps", 2)
    assert "--device warp" in refusal(run, copy, "Hi", "--device", "warp")
    assert "no chat template" in refusal(run, copy, command="chat")


# Chat templates are programs of the repository's

TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "is wrong": "{% for",
    "divides by zero": "{{ 1 // 0 }}",
    "asks for what is not there": "{{ a.b.c }}",
    "never ends": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_that_fails_is_refused_before_anything_is_typed(run, chat_copy, monkeypatch, kind, file):
    monkeypatch.setattr("dllm_hf_cli.chat.TEMPLATE_SECONDS", 0.3)
    (chat_copy / "chat_template.jinja").unlink(missing_ok=True)
    if file == "chat_template.jinja":
        (chat_copy / file).write_text(TEMPLATES[kind])
    else:
        change(chat_copy / file, chat_template=TEMPLATES[kind])
    message = refusal(run, chat_copy, command="chat")
    assert f"the chat template in {chat_copy / file} fails" in message


# Names

TYPOS = ["llada-tiny-shakespear", "llada-tiny-shakespaere", "LLaDA-8B-Instruc"]


@pytest.fixture
def no_network(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("dllm_hf.hub.checkpoint.snapshot_download", asked)


@pytest.mark.parametrize("name", TYPOS)
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(run, no_network, monkeypatch, name):
    monkeypatch.chdir(HUB_CONFIGS.parent)
    assert "did you mean hub_configs/" in refusal(run, f"hub_configs/{name}")
    assert f"did you mean {HUB_CONFIGS}/" in refusal(run, HUB_CONFIGS / name)
    monkeypatch.chdir(HUB_CONFIGS)
    assert "did you mean " in refusal(run, name)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "/nowhere", "a/b/c", "hub_configs/nowhere"])
def test_neither_is_what_only_a_path_can_be(run, no_network, monkeypatch, name):
    monkeypatch.chdir(HUB_CONFIGS.parent)
    assert f"There is no folder {name}." in refusal(run, name)
    assert "There is no folder" in refusal(run, name, "out", command="export")


def test_a_repository_that_was_downloaded_is_no_mistyped_folder(run, no_network, monkeypatch, tmp_path):
    place = tmp_path / "cache" / "models--org--tiny" / "snapshots" / "0"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place.parents[1] / "refs").mkdir()
    (place.parents[1] / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org" / "tiny2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "the Hub was asked" in refusal(run, "org/tiny")


def test_a_repository_that_was_downloaded_decodes_without_the_network(run, folder, monkeypatch, tmp_path):
    in_hub_cache(Path(folder), tmp_path / "cache", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, stdout, stderr = run("generate", "org/tiny", "Hi", "--max-new-tokens", 4)
    assert (code, stdout) == run("generate", folder, "Hi", "--max-new-tokens", 4)[:2]
    assert stderr.count("\n") == 1
