"""Repositories with quantised weights."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dllm_hf import LLM, SamplingParams, quantization
from dllm_hf.gla_dream.attention_gla_dream import DecayProjection
from dllm_hf.hub import quantize
from dllm_hf.quantization import check_runs, quantization_config

from ..builders import new_model
from .conftest import weights

pytest.importorskip("torchao")
pytest.importorskip("accelerate")

OPTIONS = {"max_new_tokens": 8, "suppress_tokens": [61]}


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def tokens(model, **options) -> list[int]:
    return model.diffusion_generate(torch.tensor([[5, 6, 7]]), **OPTIONS, **options).tolist()[0]


@pytest.mark.parametrize("family", ["llada", "sdar_moe", "llada2", "gla_dream"])
def test_the_layers_and_the_head_are_quantised_and_the_rest_is_not(family, sources, tmp_path):
    made = quantize(str(sources / family), tmp_path / "out", "int8")
    model = loaded(tmp_path / "out")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (type(module.weight) is nn.Parameter) == isinstance(module, DecayProjection)
    plain = {name: each for name, each in model.named_parameters() if type(each) is nn.Parameter}
    assert made.others == sum(each.numel() for each in plain.values())
    assert made.quantized + made.others == sum(each.numel() for each in loaded(sources / family).parameters())
    assert made.experts == sum(each.numel() for name, each in plain.items() if ".experts." in name)
    assert bool(made.experts) == hasattr(model.config, "num_experts")


def test_a_head_that_is_tied_stays_the_embedding(sources, tmp_path):
    model = loaded(sources / "dream")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    quantize(str(tmp_path / "tied"), tmp_path / "out", "int8")
    model = loaded(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight and type(model.lm_head.weight) is nn.Parameter
    tokens(model)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_requests_get_what_a_call_gets(sources, tmp_path, cache_dtype):
    quantize(str(sources / "sdar"), tmp_path / "out", "int8", "cpu")
    llm = LLM(str(tmp_path / "out"), device="cpu", cache_dtype=cache_dtype, num_cache_tokens=130)
    assert quantization.KINDS[type(llm.model.lm_head.weight).__name__] == "int8"
    [output] = llm.generate(
        [[5, 6, 7]], SamplingParams(max_tokens=8, options={"suppress_tokens": [61]}), use_tqdm=False
    )
    assert [5, 6, 7, *output.outputs[0].token_ids] == tokens(loaded(tmp_path / "out"), cache_dtype=cache_dtype)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A CPU quantises in fp8 and int4. It lacks no operation for the first, and of the second the order of the bytes."""
    from torchao.quantization import quant_api

    tiles = lambda pairs, _: pairs.view(torch.int32).reshape(len(pairs) // 8, pairs.shape[1] // 64, 32, 4)
    monkeypatch.setattr(quantization, "check_device", lambda *_: None)
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", tiles)


@pytest.mark.parametrize(("format", "size"), [("fp8", 64), ("int4", 256)])
def test_what_a_gpu_has_quantised_loads_with_torchao_alone(format, size, tmp_path, monkeypatch, as_on_a_gpu):
    """On a machine without one: to the last bit what was written, the head in 16 bits with int4, and in fp8 it decodes."""
    new_model("llada", d_model=size, mlp_hidden_size=size).save_pretrained(tmp_path / "in")
    made = quantize(str(tmp_path / "in"), tmp_path / "out", format, "cpu")
    kinds = {"dtype": torch.bfloat16, "device_map": "cpu", "quantization_config": quantization_config(format)}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "in", **kinds).state_dict()
    monkeypatch.undo()
    found = loaded(tmp_path / "out")
    linears = {f"{name}.weight" for name, module in found.named_modules() if isinstance(module, nn.Linear)}
    left_out = {"lm_head.weight"} if format == "int4" else set()
    for name, each in found.state_dict().items():
        kind, parts = quantization.KINDS.get(type(each).__name__), getattr(each, "tensor_data_names", ())
        assert kind == (format if name in linears - left_out else None), name
        tensors = [[getattr(one, part) for part in parts] or [one] for one in (each, expected[name])]
        for one, other in zip(*tensors):
            assert one.dtype == other.dtype and torch.equal(one.float(), other.float())
    assert made.quantized > made.others
    if format == "fp8":
        assert len(tokens(found)) == 3 + 8
    else:
        with pytest.raises(ValueError, match="int4 weights need an NVIDIA GPU"):
            check_runs(found)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_it_runs_without_this_package_and_gives_the_same_there(format, sources, tmp_path, fresh_processes, request):
    fresh = fresh_processes()
    if format == "fp8":
        request.getfixturevalue("as_on_a_gpu")
    quantize(str(sources / "llada"), tmp_path / "out", format, "cpu")
    fresh.ask("tokens", "tokens", name=tmp_path / "out", ids=[5, 6, 7], options=OPTIONS)
    fresh.ask("card", "card", name="out", folder=tmp_path / "out")
    fresh.run()
    assert fresh.answer("tokens") == tokens(loaded(tmp_path / "out"))
    assert fresh.answer("card")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "`torchao`" in card and "nothing else" not in card
    assert sum(map(len, weights(tmp_path / "out").values())) < 0.6 * sum(map(len, weights(sources / "llada").values()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_what_a_cpu_cannot_do_is_refused_before_anything_is_read(format, tmp_path):
    with pytest.raises(ValueError, match=f"{format} weights need an NVIDIA GPU .* take int8"):
        quantize("nothing/there", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_and_quantised_weights_are_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="choose one of fp8, int8, int4"):
        quantization_config("int2")
    quantize(str(sources / "llada"), tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="quantization_config"):
        quantize(str(tmp_path / "out"), tmp_path / "again", "int8")
    with pytest.raises(ValueError, match="`tensor_parallel_size=2`: the model's weights are quantised"):
        LLM(str(tmp_path / "out"), tensor_parallel_size=2, device="cpu")
    assert not (tmp_path / "again").exists()


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r'pip install "dllm-hf\[quantize\]"'):
        quantization_config("int8")


def test_weights_that_a_device_cannot_multiply_with_are_named(sources):
    class Int4TilePackedTo4dTensor(nn.Parameter):
        pass

    model = loaded(sources / "llada")
    check_runs(model)
    model.lm_head.weight = Int4TilePackedTo4dTensor(model.lm_head.weight.data)
    with pytest.raises(ValueError, match="int4 weights need"):
        check_runs(model)


def test_the_repository_s_configuration_says_how_it_was_quantised(sources, tmp_path):
    quantize(str(sources / "llada"), tmp_path / "out", "int8")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "torchao" and "AutoModelForCausalLM" in config["auto_map"]
