"""`dllm-hf export`: what it prints, how it ends. What it writes is tested in `tests/hub`."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import dllm_hf_cli.export

ROOT = Path(__file__).parents[2]

exporting = importlib.import_module("dllm_hf.hub.export")  # as an attribute of `dllm_hf.hub` it is the function


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def published(monkeypatch):
    """What would have been published: (folder, name, private)."""
    calls = []

    def push(folder, name, private=None):
        calls.append((str(folder), name, private))
        return f"https://huggingface.co/{name}/commit/1"

    monkeypatch.setattr(dllm_hf_cli.export, "push", push)
    return calls


def test_it_says_what_it_has_written(run, folder, tmp_path):
    assert run("export", folder, tmp_path / "out") == (0, f"Written: {tmp_path / 'out'}\n", "")
    there = names(tmp_path / "out")
    assert {"config.json", "README.md", "model.safetensors", "tokenizer.json", "modeling_llada.py"} <= there


def test_config_only_leaves_weights_and_tokenizer_out(run, folder, tmp_path):
    assert run("export", folder, tmp_path / "out", "--config-only")[0] == 0
    assert not names(tmp_path / "out") & {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_its_options_may_stand_anywhere(run, folder, tmp_path):
    assert run("export", "--config-only", folder, tmp_path / "out")[0] == 0
    assert "model.safetensors" not in names(tmp_path / "out")


def test_what_it_wrote_is_what_the_other_commands_take(run, folder, tmp_path):
    run("export", folder, tmp_path / "out")
    arguments = ("Hi", "--max-new-tokens", 8, "--remasking-strategy", "low_confidence_static")
    written, original = (run("generate", each, *arguments) for each in (tmp_path / "out", folder))
    # The last thing that is said is how long it took.
    assert written[:2] == original[:2] and written[2].split(",")[:3] == original[2].split(",")[:3]


def test_push_publishes_what_it_has_written(run, folder, tmp_path, published):
    code, stdout, stderr = run("export", folder, tmp_path / "out", "--push", "org/name")
    assert code == 0
    assert stdout.splitlines() == [
        f"Written: {tmp_path / 'out'}",
        "Published: https://huggingface.co/org/name/commit/1",
    ]
    assert stderr == f"Publishing {tmp_path / 'out'} as org/name ...\n"
    assert published == [(str(tmp_path / "out"), "org/name", None)]
    assert 'name = "org/name"' in (tmp_path / "out" / "README.md").read_text()


def test_private_is_passed_on(run, folder, tmp_path, published):
    assert run("export", folder, tmp_path / "out", "--push", "org/name", "--private")[0] == 0
    assert published == [(str(tmp_path / "out"), "org/name", True)]


def test_private_without_push_is_refused_and_nothing_is_written(run, folder, tmp_path):
    code, stdout, stderr = run("export", folder, tmp_path / "out", "--private")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("dllm-hf: error: --private") and "--push" in stderr
    assert names(tmp_path) == set()


def test_a_push_that_failed_ends_with_2_and_leaves_what_was_written(run, folder, tmp_path, monkeypatch):
    def push(*args, **kwargs):
        raise OSError("org/name was not published: no network.\nPush again.")

    monkeypatch.setattr(dllm_hf_cli.export, "push", push)
    code, stdout, stderr = run("export", folder, tmp_path / "out", "--push", "org/name")
    assert code == 2 and stdout == f"Written: {tmp_path / 'out'}\n"
    assert stderr.splitlines()[-1] == "dllm-hf: error: org/name was not published: no network. Push again."
    assert "config.json" in names(tmp_path / "out")


@pytest.mark.parametrize(
    "arguments",
    [(), ("SOURCE",), ("SOURCE", "OUT", "more"), ("SOURCE", "OUT", "--steps", "3"), ("SOURCE", "OUT", "--push")],
)
def test_arguments_that_are_not_its_own_are_refused_in_one_line(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run("export", *arguments)
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1
    assert stderr.startswith("dllm-hf export: error: ") and "dllm-hf export --help" in stderr
    assert names(tmp_path) == set()


@pytest.fixture(params=["no source", "no weights", "cut short", "not JSON", "unknown", "out is there"])
def hopeless(request, folder, tmp_path):
    """(source, out) of what cannot be done."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for path in Path(folder).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    if request.param == "no source":
        return tmp_path / "nowhere", out
    if request.param == "no weights":
        (source / "model.safetensors").unlink()
    elif request.param == "cut short":
        (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    elif request.param == "not JSON":
        (source / "config.json").write_text("{\n")
    elif request.param == "unknown":
        (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    else:
        return source, source
    return source, out


def test_what_cannot_be_done_ends_with_2_and_one_line_and_nothing_is_written(run, hopeless, tmp_path):
    before = names(tmp_path)
    code, stdout, stderr = run("export", *hopeless)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("dllm-hf: error: ") and stderr.count("\n") == 1
    assert names(tmp_path) == before


def test_ctrl_c_ends_it_with_130_and_nothing_is_written(run, folder, tmp_path, monkeypatch):
    def stop(*files):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_link_or_copy", stop)
    assert run("export", folder, tmp_path / "out")[0] == 130
    assert names(tmp_path) == set()


def test_help_is_given_on_request_and_names_every_option(run):
    code, stdout, stderr = run("export", "--help")
    assert (code, stderr) == (0, "") and stdout.startswith("usage: dllm-hf export")
    assert all(name in stdout for name in ("SOURCE", "OUT", "--config-only", "--push", "--private"))
    assert "export" in run("--help")[1]


def test_export_edge_writes_what_it_says(run, tmp_path, monkeypatch):
    calls = []

    def write(model, example_inputs, output_path, quantization, block_length):
        calls.append((tuple(example_inputs[0].shape), quantization, block_length))
        (tmp_path / "model.pte").write_bytes(b"0" * 1_500_000)
        return tmp_path / "model.pte"

    pytest.importorskip("executorch", reason='needs ExecuTorch: pip install "dllm-hf[edge]"')
    monkeypatch.setattr("dllm_hf.edge.export_model", write)
    monkeypatch.delitem(sys.modules, "dllm_hf_cli.export_edge", raising=False)
    source = ROOT / "tests/golden/llada-mha"
    code, stdout, _ = run("export-edge", source, tmp_path / "out", "--quantization", "int8", "--columns", "40")
    assert (code, stdout) == (0, f"Written: {tmp_path / 'model.pte'}, 1.5 MB\n")
    assert calls == [((1, 40), "int8", None)]
    code, _, stderr = run("export-edge", source, tmp_path)
    assert code == 2 and "there already" in stderr
    assert run("export-edge", source, tmp_path / "out", "--rows", "0")[2].endswith("--rows 0: give at least 1.\n")
