"""LLaDA with the model in a C++ runtime: text, tasks and logits are those of the model that was exported."""

import importlib
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dllm_hf.runtimes.exported import load_exported
from dllm_hf.runtimes.llada import DeviceType, InferTask, LLaDAForCausalLM, LLaDAForCauslLM

from ..builders import character_tokenizer, generators, left_pad
from .comparing import GOLDEN, MASK

pytestmark = pytest.mark.slow  # exports
NEEDS = {"onnxruntime": ("onnxruntime", "onnxscript"), "llama-cpp": ("llama_cpp", "gguf")}
UNSEEN = {"suppress_tokens": [*range(59, 320)]}  # tokens of the checkpoint that the tokenizer lacks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    character_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llada-mha", dtype=torch.float32)
    model.config._name_or_path = str(folder)
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The folder for a runtime, and what decodes with it."""
    root = tmp_path_factory.mktemp("exported")

    @cache
    def pair(runtime: str) -> tuple[Path, LLaDAForCauslLM]:
        for each in NEEDS[runtime]:
            pytest.importorskip(each, reason=f'needs {each}: pip install "dllm-hf[{runtime}]"')
        folder = root / runtime
        if runtime == "onnxruntime":
            importlib.import_module("dllm_hf.runtimes.onnx_export").export_onnx(model, folder)
        else:
            importlib.import_module("dllm_hf.runtimes.gguf_export").export_gguf(model, folder, "f32")
        return folder, LLaDAForCauslLM(folder)

    return pair


@pytest.fixture(params=NEEDS)
def runtime(request) -> str:
    return request.param


@pytest.fixture
def llada(exported, runtime) -> LLaDAForCauslLM:
    return exported(runtime)[1]


def completion(model, prompt: str, **options) -> str:
    """What the model itself writes."""
    tokenizer = character_tokenizer()
    sequences = model.diffusion_generate(**tokenizer(prompt, return_tensors="pt"), **options, **UNSEEN)
    return tokenizer.decode(sequences[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature_": 0.5, "block_length": 6},
        {"cfg_scale": 1.0, "remasking": "random"},
        {"max_steps": 4, "block_length": 6, "logits_eos_inf": True, "confidence_eos_eot_inf": True},
        {"mask_id": 299, "threshold": 0.3},
    ],
)
def test_it_writes_what_the_model_writes(model, llada, options):
    options = {"max_steps": 12, "gen_length": 12, "block_length": 12, "remasking": "low_confidence", **options}
    written = []
    for write in (completion, LLaDAForCauslLM.generate, LLaDAForCauslLM.generate_with_cpp_model):
        torch.manual_seed(0)
        one, more = (model, {}) if write is completion else (llada, UNSEEN)
        written.append(write(one, "To be", **options, **more))
    assert written[0] == written[1] == written[2] and len(written[0]) == 12


def test_prompts_of_a_list_get_what_each_gets_alone(llada):
    prompts, options = ["To be or not", "a", "Who is"], {"gen_length": 8, "max_steps": 8, "block_length": 4, **UNSEEN}
    together = llada.generate(prompts, **options)
    assert together == [llada.generate(each, **options) for each in prompts]


def test_verbose_prints_each_step(llada, capsys):
    text = llada.generate("To be", max_steps=4, gen_length=8, block_length=8, verbose=True, **UNSEEN)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"step {number}" for number in (1, 2, 3, 4)]
    assert lines[-1].endswith(text)
    llada.generate("To be", max_steps=4, gen_length=8, block_length=8, **UNSEEN)
    assert capsys.readouterr().out == ""


# --- tasks


TASKS = [
    {"tokens": [5, 6, 7, 8, 9, 10, 11], "max_tokens": 9, "temperature": 0.7, "topk": 5, "seed": 1, "block_length": 4},
    {"tokens": [3], "max_tokens": 6, "temperature": 1.0, "topp": 0.6, "seed": 2, "max_steps": 2},
    {"tokens": [20, MASK, 21], "max_tokens": 4, "remasking": "sequential"},
    {"tokens": [30, 31], "max_tokens": 12, "block_length": 4, "end_tokens": [*range(150)]},
]


def alone(model, task: dict) -> list[int]:
    names = {"max_tokens": "max_new_tokens", "topk": "top_k", "topp": "top_p", "end_tokens": "eos_token_id"}
    options = {names.get(name, name): value for name, value in task.items() if name not in ("tokens", "seed")}
    more = {"generator": generators([task["seed"]])} if "seed" in task else {}
    text = model.diffusion_generate(torch.tensor([task["tokens"]]), **options, **more)[0].tolist()
    ends = [i + 1 for i in range(len(task["tokens"]), len(text)) if text[i] in task.get("end_tokens", ())]
    return text[: min(ends, default=len(text))]


def test_each_task_gets_what_it_would_get_alone(model, llada):
    """Ragged prompts, and options of their own; two begin later."""
    tasks = [InferTask(**each) for each in TASKS]
    got: list[list[int]] = [[] for _ in tasks]
    rounds = 0
    while not all(task.is_done for task in tasks):
        passed = tasks if rounds > 1 else tasks[:2]
        for tokens, new in zip(got, llada.batch_infer_one_round(passed)):
            tokens += new
        rounds += 1
    assert [task.canvas for task in tasks] == [alone(model, each) for each in TASKS]
    assert len(tasks[3].canvas) < 14
    for task, tokens in zip(tasks[:3], got):
        filled = [new for new, old in zip(task.canvas, [*task.tokens, *[MASK] * task.max_tokens]) if old == MASK]
        assert sorted(tokens) == sorted(filled)
    assert llada.batch_infer_one_round(tasks) == [[]] * 4


def test_tasks_that_began_together_go_on_together(llada):
    tasks = [InferTask([5, 6], 4) for _ in range(3)]
    llada.batch_infer_one_round(tasks)
    with pytest.raises(ValueError, match="2 tasks that began with others are missing"):
        llada.batch_infer_one_round(tasks[:1])


@torch.no_grad()
def test_logits_of_a_batch_are_those_of_the_model(model, llada):
    inputs = left_pad([[5, 6, 7, 8, 9], [10, MASK, 12], [13]])
    logits = llada.forward_logits_batch(inputs["input_ids"], inputs["attention_mask"])
    for row, text in enumerate(inputs["input_ids"]):
        number = int(inputs["attention_mask"][row].sum())
        expected = model(input_ids=text[None, -number:]).logits[0]
        torch.testing.assert_close(logits[row, -number:], expected, atol=1e-4, rtol=0)
        assert logits[row, :-number].isnan().all()
    assert logits.shape == (3, 5, 320)
    with pytest.raises(ValueError, match="right-padded"):
        llada.forward_logits_batch(inputs["input_ids"], inputs["attention_mask"].flip(1))


# --- what fails


def test_a_runtime_that_fails_raises(llada, monkeypatch):
    """There are no other logits to go on with."""

    def fail(*args, **kwargs):
        raise RuntimeError("the runtime has failed")

    if hasattr(llada.model, "session"):
        monkeypatch.setattr(llada.model, "session", SimpleNamespace(run=fail))
    else:
        monkeypatch.setattr("llama_cpp.llama_decode", fail)
    inputs = torch.tensor([[5, 6]])
    calls = [lambda: llada.generate("To be", gen_length=4, block_length=4), lambda: llada.forward_logits_batch(inputs)]
    calls += [lambda: llada.batch_infer_one_round([InferTask([5, 6], 4)])]
    for call in calls:
        with pytest.raises(RuntimeError, match="the runtime has failed"):
            call()


def test_devices_that_a_runtime_lacks_are_refused_by_name(exported, runtime):
    folder, _ = exported(runtime)
    with pytest.raises(ValueError, match="ndev=2.*a CPU is one device"):
        LLaDAForCauslLM(folder, DeviceType.DEVICE_TYPE_CPU, ndev=2)
    message = "llama.cpp finds \\d+ GPUs" if runtime == "llama-cpp" else "OnnxModel computes on the CPU alone"
    with pytest.raises(ValueError, match=message):
        LLaDAForCauslLM(folder, DeviceType.DEVICE_TYPE_NVIDIA, ndev=99)


def test_folders_of_something_else_are_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="is no exported model: it has none of dllm_hf_onnx.json"):
        LLaDAForCausalLM(GOLDEN / "llada-mha")
    folder = shutil.copytree(exported("onnxruntime")[0], tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        LLaDAForCauslLM(folder).generate("To be")


def test_other_families_are_refused(tmp_path):
    pytest.importorskip("gguf", reason='needs gguf: pip install "dllm-hf[gguf]"')
    pytest.importorskip("llama_cpp", reason='needs llama.cpp: pip install "dllm-hf[llama-cpp]"')
    from dllm_hf.runtimes.gguf_export import export_gguf

    dream = AutoModelForCausalLM.from_pretrained(GOLDEN / "dream-gqa", dtype=torch.float32)
    folder = export_gguf(dream, tmp_path / "out", "f32")
    with pytest.raises(ValueError, match="is of the family 'Dream'"):
        LLaDAForCauslLM(folder)
    assert load_exported(folder).family == "Dream"
