"""What an export takes from a folder and leaves as it was, and what saving a model with its code writes."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_hf.hub import export

from ..builders import new_model
from .conftest import content, in_hub_cache, weights


def test_files_that_the_model_does_not_use_are_not_taken(source, tmp_path):
    clean = content(export(str(source), tmp_path / "clean"))
    others = ["modeling_llada.py", "setup.py", "pytorch_model.bin", "optimizer.pt", "notes.txt", ".gitattributes"]
    others += ["consolidated.safetensors", "training_args.bin", "evil.sh"]
    for name in others:
        (source / name).write_text("raise SystemExit('not yours')\n")
    for folder in (".git", "onnx", "custom_generate"):
        (source / folder).mkdir()
        (source / folder / "config").write_text("x")
    out = export(str(source), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == clean.keys()
    assert content(out)["modeling_llada.py"] == clean["modeling_llada.py"]


def test_a_chat_template_and_the_parts_of_a_slow_tokenizer_are_taken(source, tmp_path):
    texts = {"chat_template.jinja": "{{ x }}", "vocab.json": "{}", "merges.txt": "", "special_tokens_map.json": "{}"}
    for name, text in {**texts, "added_tokens.json": "{}"}.items():
        (source / name).write_text(text)
    out = export(str(source), tmp_path / "out")
    assert {*texts, "added_tokens.json"} <= {*content(out)}


def test_the_code_that_a_source_names_is_not_asked_for(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {
        "AutoModel": "somewhere/else--modeling_evil.Evil",
        "AutoModelForMaskedLM": "modeling_evil.Evil",
    }
    (source / "config.json").write_text(json.dumps(config))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = content(export(str(source), tmp_path / "out"))
    assert not [name for name, data in out.items() if b"evil" in data]


def test_what_was_exported_can_be_exported_again(source, tmp_path):
    first = export(str(source), tmp_path / "first", name="org/name")
    second = export(str(first), tmp_path / "second", name="org/name")
    one, other = content(first), content(second)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] in ([], ["README.md"])


def test_an_empty_folder_can_be_exported_to(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert "config.json" in content(export(str(source), tmp_path / "out"))


def test_the_folder_one_is_in_can_be_exported_to_if_it_is_empty(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export(str(source), ".")
    assert "config.json" in content(tmp_path / "out")


def test_a_path_that_is_relative_or_goes_through_new_folders_can_be_exported_to(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "config.json" in content(export("source", "new/deep/out"))
    assert {path.name for path in (tmp_path / "new" / "deep").iterdir()} == {"out"}


def test_saving_over_an_export_leaves_the_source_as_it_was(source, tmp_path):
    (source / "chat_template.jinja").write_text("{{ messages }}")
    before = content(source)
    out = export(str(source), tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(out)
    tokenizer.add_tokens(["new"])
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(out)
    assert content(source) == before


def test_weights_that_cannot_be_linked_are_copied(source, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    assert weights(export(str(source), tmp_path / "out")) == weights(source)


def test_saving_with_code_keeps_a_card_that_is_there(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    new_model("llada").save_pretrained(tmp_path, include_code=True)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_saving_without_code_is_as_the_librarys(tmp_path):
    new_model("llada").save_pretrained(tmp_path)
    assert {*content(tmp_path)} == {"config.json", "generation_config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_saving_over_an_export_leaves_the_hubs_cache_as_it_was(source, cache, tmp_path):
    in_hub_cache(source, cache, "org/original")
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    tokenizer = AutoTokenizer.from_pretrained(export("org/original", tmp_path / "out"))
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "out")
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
