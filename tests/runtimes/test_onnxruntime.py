"""ONNX Runtime: an exported model gives the logits and the tokens of the model that it comes from."""

import shutil
import sys
from functools import cache

import pytest
import torch

from dllm_hf import LLM, SamplingParams

from ..builders import character_tokenizer, new_model
from .comparing import (
    CELLS,
    CHECKPOINTS,
    ROWS,
    change,
    check_guidance_and_defaults,
    check_later_rows,
    check_strategies,
    check_windows,
    golden,
    other_folders,
)

pytest.importorskip("onnxruntime", reason='needs ONNX Runtime: pip install "dllm-hf[onnxruntime]"')
pytest.importorskip("onnxscript", reason='the export needs it: pip install "dllm-hf[onnxruntime]"')

from dllm_hf.runtimes import onnx_export  # noqa: E402
from dllm_hf.runtimes.onnx_export import export_onnx  # noqa: E402
from dllm_hf.runtimes.onnx_runtime import FORMAT, OnnxModel  # noqa: E402

pytestmark = pytest.mark.slow  # exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of each family and the folder that it is exported to, once."""
    root = tmp_path_factory.mktemp("onnx")

    @cache
    def pair(family: str, quantization: str | None = None) -> tuple:
        model = golden(family)
        return model, export_onnx(model, root / f"{family}-{quantization}", quantization)

    return pair


@pytest.fixture(scope="module")
def both(exported):
    """The model and what ONNX Runtime makes of it."""

    @cache
    def pair(family: str) -> tuple:
        model, folder = exported(family)
        return model, OnnxModel.from_pretrained(folder)

    return pair


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an exported folder, to break."""
    return shutil.copytree(exported("sdar")[1], tmp_path / "copy")


@pytest.mark.parametrize("family, policy", CELLS)
def test_logits_of_every_window_of_a_decode_are_those_of_the_model(both, family, policy):
    check_windows(*both(family), policy)


@pytest.mark.parametrize("family, policy", CELLS)
def test_tokens_of_every_strategy_are_those_of_the_model(both, family, policy):
    check_strategies(*both(family), policy)


@pytest.mark.parametrize("family, policy", CELLS)
def test_rows_that_join_a_decoder_later_get_what_they_get_alone(both, family, policy):
    check_later_rows(*both(family), policy)


def test_guidance_and_the_defaults_are_those_of_the_model(both):
    for family in CHECKPOINTS:
        check_guidance_and_defaults(*both(family))


def test_a_conversation_goes_on_from_its_cache(both):
    _, exported = both("sdar")
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    first = exported.diffusion_generate(torch.tensor([[5, 6, 7, 8, 9]]), **options)
    text = torch.cat([first.sequences, torch.tensor([[11, 12]])], dim=1)
    expected = exported.diffusion_generate(text, **options).sequences
    got = exported.diffusion_generate(text, past_key_values=first.past_key_values, **options)
    assert got.sequences.tolist() == expected.tolist()


def test_the_engine_serves_an_exported_model(both):
    model, exported = both("sdar")
    params = SamplingParams(max_tokens=8, temperature=0.0)
    got, expected = (
        [each.outputs[0].token_ids for each in LLM(one, tokenizer=character_tokenizer()).generate(ROWS[::2], params)]
        for one in (exported, model)
    )
    assert got == expected


def test_int8_is_smaller_and_close(exported):
    model, folder = exported("dream", "int8")
    size = lambda path: sum(each.stat().st_size for each in path.glob("model.onnx.data"))
    assert size(folder) < 0.4 * size(exported("dream")[1])
    request = {"max_new_tokens": 8, "block_length": 4, "remasking_strategy": "sequential", "cache_policy": "dual"}
    logits = []
    for each in (model, OnnxModel.from_pretrained(folder)):
        hook = lambda step, tokens, raw: logits.append(raw[0, 0]) or raw
        each.diffusion_generate(torch.tensor([[5, 6, 7]]), generation_logits_hook_func=hook, **request)
    eager, int8 = logits[0], logits[len(logits) // 2]
    assert (eager - int8).square().mean().sqrt() < 0.3 * eager.std()
    assert not torch.equal(eager, int8)


def test_the_tokenizer_goes_with_the_model(tmp_path, monkeypatch):
    character_tokenizer().save_pretrained(tmp_path / "source")
    model = new_model("dream")
    model.config._name_or_path = str(tmp_path / "source")
    write = lambda model, folder: [(folder / name).write_bytes(b"x") for name in ("model.onnx", "model.onnx.data")]
    monkeypatch.setattr(onnx_export, "_write_graph", write)
    export_onnx(model, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "source/tokenizer.json").read_bytes()


# --- what is refused


@pytest.mark.parametrize(
    "family, reason", [("gla_dream", "recurrent states"), ("sdar_moe", "experts"), ("llada_moe", "experts")]
)
def test_families_without_such_a_graph_are_refused_by_name(tmp_path, family, reason):
    model = new_model(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*{reason}"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = new_model("dream")
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        export_onnx(new_model("dream").bfloat16(), tmp_path / "out")
    with pytest.raises(ValueError, match="quantization='int4'"):
        export_onnx(model, tmp_path / "out", "int4")
    with pytest.raises(ValueError, match="there already"):
        export_onnx(model, tmp_path)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        export_onnx(new_model("dream", rope_parameters=rope), tmp_path / "out")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_remedy(exported, tmp_path, monkeypatch, package):
    folder = exported("sdar")[1]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'`{package}`.*pip install "dllm-hf\[onnxruntime\]"'):
        export_onnx(new_model("dream"), tmp_path / "out")
    if package == "onnxruntime":
        with pytest.raises(ValueError, match=r'pip install "dllm-hf\[onnxruntime\]"'):
            OnnxModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_truncated_file_is_refused(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} is cut short.*export the model again"):
        OnnxModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json", FORMAT.description])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}: export the model again"):
        OnnxModel.from_pretrained(folder)


@pytest.mark.parametrize("name, changes, message", other_folders(FORMAT.description, 2))
def test_a_file_of_another_version_or_family_is_refused(folder, name, changes, message):
    change(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        OnnxModel.from_pretrained(folder)


def test_a_description_that_is_no_json_is_refused(folder):
    (folder / FORMAT.description).write_text('{"format": 1')
    with pytest.raises(ValueError, match="cannot be read: export the model again"):
        OnnxModel.from_pretrained(folder)


def test_a_policy_that_the_model_lacks_is_refused_before_the_first_pass(both):
    _, exported = both("sdar")
    with pytest.raises(ValueError, match="cache_policy='dual'.*choose one of block, none"):
        exported.diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4, cache_policy="dual")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(model, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx_export, "_write_graph", fail)
    with pytest.raises(error):
        export_onnx(new_model("dream"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
