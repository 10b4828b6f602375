"""A card says what is known of a repository, and nothing that it should not: it is published."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from dllm_hf.hub import export, export_loop

from ..builders import new_model
from .conftest import content, in_hub_cache, weights


def header(folder: Path):
    return ModelCard.load(folder / "README.md").data


def test_a_repository_is_the_base_model_of_its_export_and_lends_it_its_licence(source, cache, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: some/other\n---\n# Theirs\n")
    in_hub_cache(source, cache, "org/original")
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    out = export("org/original", tmp_path / "out", name="me/mine")
    data = header(out)
    assert (data.license, data.base_model, data.language) == ("mit", "org/original", "en")
    text = (out / "README.md").read_text()
    assert "org/original" in text and "mit" in text and 'name = "me/mine"' in text and "# mine" in text
    assert weights(out) == weights(source)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    assert not [path for path in out.iterdir() if path.is_symlink()]


def test_a_folder_keeps_the_base_model_and_licence_of_its_card(source, tmp_path):
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: a/b\n---\n"
    )
    data = header(export(str(source), tmp_path / "out"))
    assert (data.license, data.license_name, data.base_model) == ("other", "own", "a/b")


@pytest.mark.parametrize("text", ["", "# No header\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nx\n---\n"])
def test_a_card_without_a_readable_header_is_no_obstacle(source, tmp_path, text):
    (source / "README.md").write_text(text)
    assert header(export(str(source), tmp_path / "out")).license == "unknown"


def test_the_card_says_what_the_model_is_and_does_not_promise_a_licence(source, tmp_path):
    text = (export(str(source), tmp_path / "out") / "README.md").read_text()
    assert "LLaDA" in text and "licence is not known" in text and "Apache-2.0" in text


def usage(folder: Path) -> str:
    """The name that the card's code loads."""
    code = re.search(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.S | re.M)[1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and node.targets[0].id == "name":
            return ast.literal_eval(node.value)
        if isinstance(node, ast.keyword) and node.arg == "custom_generate":
            return ast.literal_eval(node.value)


def paragraphs(folder: Path) -> list[str]:
    """Of the card's text, which begins with its title."""
    return ModelCard.load(folder / "README.md").text.strip().split("\n\n")


WAYS = {
    "an export": lambda source, out: export(str(source), out),
    "an export of a part": lambda source, out: export(str(source), out, config_only=True),
    "the loop": lambda source, out: export_loop(out),
    "a model": lambda source, out: new_model("llada").save_pretrained(out, include_code=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_path_of_this_machine_is_in_a_card(source, tmp_path, way, monkeypatch):
    (source / "README.md").write_text(f"---\nbase_model: {source}\nlicense: mit\n---\n")
    WAYS[way](source, tmp_path / "secret" / "out")
    text = (tmp_path / "secret" / "out" / "README.md").read_text()
    assert str(tmp_path) not in text and "secret" not in text and "source" not in text.split()
    assert usage(tmp_path / "secret" / "out") == "out"
    (tmp_path / "secret" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "secret" / "here")
    WAYS[way](source, ".")
    assert usage(tmp_path / "secret" / "here") == "here"


NAMES = [
    'a"b',
    "a'b",
    "a\\b",
    "a\nb",
    "a`b```c",
    "{name}",
    "%s",
    "a b",
    "é界",
    "a\u202eb",
    '"; import os; "',
    "**b** <i>",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["an export of a part", "the loop"])
def test_every_name_of_a_folder_is_a_string_in_the_usage_and_text_in_the_title(source, tmp_path, way, name):
    WAYS[way](source, tmp_path / name)
    assert usage(tmp_path / name) == name
    title = paragraphs(tmp_path / name)[0]
    assert title.startswith("# ") and "\n" not in title
    if way != "the loop":
        assert not re.search(r"(?<!\\)[`*<]", title)


def test_the_loop_is_loaded_by_the_name_it_is_published_under(tmp_path):
    assert usage(export_loop(tmp_path / "out", name="me/loop")) == "me/loop"


LICENCES = [
    "mit\n\n# Buy at [x](http://x)",
    "`mit`",
    "[mit](http://x)",
    "mit <script>",
    "mit\n---\n# Mine",
    "m" * 5000,
    "",
    5,
    True,
    {"a": "b"},
    ["mit", "[x](http://x)"],
    [],
    [["mit"]],
]


@pytest.mark.parametrize("licence", LICENCES, ids=lambda value: repr(value)[:20])
def test_a_licence_that_is_no_identifier_is_not_repeated(source, tmp_path, licence):
    values = {"license": licence, "license_name": licence, "license_link": licence, "language": licence}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump({**values, 'base_model': licence})}---\n# Theirs\n")
    out = export(str(source), tmp_path / "out", config_only=True)
    assert header(out).license == "unknown" and header(out).base_model is None
    (source / "README.md").unlink()
    assert paragraphs(out) == paragraphs(export(str(source), tmp_path / "other" / "out", config_only=True))
    assert "licence is not known" in paragraphs(out)[2]


def test_several_licences_are_named(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    out = export(str(source), tmp_path / "out")
    assert header(out).license == ["mit", "apache-2.0"] and "their licence: mit, apache-2.0." in paragraphs(out)[2]


# Links


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "through a folder"])
def test_a_link_that_leads_out_of_the_source_is_refused_and_nothing_is_written(source, tmp_path, name, kind):
    secret = tmp_path / "secret.json"
    secret.write_text((source / name).read_text() if (source / name).exists() else "{}")
    (source / name).unlink(missing_ok=True)
    if kind == "through a folder":
        (source / "sub").symlink_to(tmp_path)
        (source / name).symlink_to(source / "sub" / "secret.json")
    else:
        (source / name).symlink_to(secret if kind == "absolute" else Path("../secret.json"))
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret.json, outside of"):
        export(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_so_is_one_to_weights_or_a_card(source, tmp_path, name):
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link to .*elsewhere, outside of"):
        export(str(source), tmp_path / "out")


def test_a_link_that_stays_in_the_source_is_followed(source, tmp_path):
    expected = content(export(str(source), tmp_path / "plain"))
    (source / "files").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (source / name).rename(source / "files" / name)
        (source / name).symlink_to(Path("files") / name)
    (tmp_path / "link").symlink_to(source)
    out = content(export(str(tmp_path / "link"), tmp_path / "out"))
    assert {**out, "README.md": b""} == {**expected, "README.md": b""}


def test_the_hubs_cache_can_be_exported_by_its_path_as_well(source, tmp_path):
    snapshot = in_hub_cache(source, tmp_path / "downloads", "org/original")
    assert weights(export(str(snapshot), tmp_path / "out")) == weights(source)


def test_what_only_looks_like_the_hubs_cache_is_not_followed_out_of_it(source, tmp_path):
    snapshot = in_hub_cache(source, tmp_path / "downloads", "org/original")
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to .*elsewhere"):
        export(str(snapshot), tmp_path / "out")


def test_blobs_that_several_repositories_share_are_followed(source, cache, tmp_path):
    snapshot = in_hub_cache(source, cache, "org/original")
    (cache / "blobs").mkdir()
    for blob in (snapshot.parents[1] / "blobs").iterdir():
        blob.rename(cache / "blobs" / blob.name)
        blob.symlink_to(Path("../../blobs") / blob.name)
    assert weights(export("org/original", tmp_path / "out")) == weights(source)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
