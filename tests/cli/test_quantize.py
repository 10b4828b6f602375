"""`dllm-hf quantize` and `dllm-hf warmup`."""

import argparse

import pytest
import torch

from dllm_hf.hub import quantize

from ..builders import new_model
from .conftest import ROOT


def test_quantize_writes_a_folder_that_generate_decodes_with(run, folder, tmp_path):
    pytest.importorskip("torchao")
    pytest.importorskip("accelerate")
    code, stdout, _ = run("quantize", folder, tmp_path / "out", "--weights", "int8", "--device", "cpu")
    assert code == 0 and stdout.startswith(f"Written: {tmp_path / 'out'}, ") and stdout.endswith(" weights in int8\n")
    code, stdout, stderr = run("generate", tmp_path / "out", "abc", "--device", "cpu", "--max-new-tokens", "8")
    assert (code, stdout[:3]) == (0, "abc") and "8 tokens" in stderr


def test_quantize_says_that_experts_stay_as_they_are(run, tmp_path):
    pytest.importorskip("torchao")
    pytest.importorskip("accelerate")
    code, _, stderr = run(
        "quantize", ROOT / "tests/golden/sdar_moe-b4", tmp_path / "out", "--weights", "int8", "--device", "cpu"
    )
    assert code == 0 and stderr.startswith("The experts, 221,184 of 319,568 weights, stay as they are")


def test_warmup_says_where_there_is_nothing_to_compile(run, folder):
    code, _, stderr = run("warmup", folder, "--device", "cpu")
    assert code == 2 and "compiles no kernels" in stderr


@pytest.mark.parametrize("family", ["llada", "sdar_moe"])
def test_warmup_decodes_with_two_layers_of_the_checkpoint_s_shapes(family, tmp_path, monkeypatch, run):
    pytest.importorskip("torchao")
    pytest.importorskip("accelerate")
    pytest.importorskip("triton")
    from dllm_hf_cli import warmup

    new_model(family, num_hidden_layers=3).save_pretrained(tmp_path / "plain")
    quantize(str(tmp_path / "plain"), tmp_path / "int8", "int8", "cpu")
    for name in ("plain", "int8"):
        arguments = argparse.Namespace(trust_remote_code=False, dtype="auto")
        model = warmup.two_layers(tmp_path / name, arguments, torch.device("cpu"))
        assert len(model.model.layers) == 2
        kinds = {type(layer.self_attn.o_proj.weight).__name__ for layer in model.model.layers}
        assert kinds == {"Parameter" if name == "plain" else "Int8Tensor"}
    monkeypatch.setattr(warmup, "are_possible", lambda device: True)
    monkeypatch.setattr(warmup, "PROMPTS", (3, 20))
    monkeypatch.setattr(warmup, "BATCHES", (2,))
    code, stdout, stderr = run("warmup", tmp_path / "int8", "--device", "cpu", "--block-length", "4")
    assert code == 0, stderr
    assert " kernels compiled in " in stdout


def test_warmup_decodes_with_the_options_that_have_kernels_of_their_own(run, folder, monkeypatch):
    pytest.importorskip("triton")
    from dllm_hf.generation import decoder
    from dllm_hf_cli import warmup

    made, opened = [], decoder.Decoder.__init__
    noted = lambda self, backend, workspace, *rest, **more: (
        made.append((workspace.state and workspace.state.cache_dtype, workspace.canvas.drafts)),
        opened(self, backend, workspace, *rest, **more),
    )[1]
    monkeypatch.setattr(decoder.Decoder, "__init__", noted)
    monkeypatch.setattr(warmup, "are_possible", lambda device: True)
    monkeypatch.setattr(warmup, "PROMPTS", (3,))
    monkeypatch.setattr(warmup, "BATCHES", (2,))
    options = ["--device", "cpu", "--block-length", "8", "--cache-dtype", "int8", "--draft-steps", "2"]
    code, _, stderr = run("warmup", folder, *options)
    assert code == 0, stderr
    # For each policy with a cache a call without drafts, one with them, and the engine, which drafts what allows it.
    assert made == 2 * [("int8", 0), ("int8", 2), ("int8", 2)]  # `prefix` and `dual`
    code, _, stderr = run("warmup", folder, "--device", "cpu", "--cache-dtype", "fp9")
    assert code == 2 and "fp9" in stderr
