"""ExecuTorch: an exported file gives the logits and the tokens of the model that it comes from."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from ..builders import character_tokenizer, left_pad, load_script, new_model
from .comparing import CELLS, CHECKPOINTS, ROWS, change, check_strategies, check_windows, other_folders
from .test_llada import TASKS, UNSEEN, alone, completion

pytest.importorskip("executorch.exir", reason='needs ExecuTorch: pip install "dllm-hf[edge]"')

from dllm_hf import LLM, DiffusionGenerationConfig, SamplingParams  # noqa: E402
from dllm_hf.edge import DiffusionEdge, export_model  # noqa: E402
from dllm_hf.edge import export as edge_export  # noqa: E402
from dllm_hf.runtimes.executorch_runtime import FORMAT  # noqa: E402
from dllm_hf.runtimes.llada import InferTask, LLaDAForCauslLM  # noqa: E402

from .executorch_exports import EXAMPLE, LAYERS  # noqa: E402

pytestmark = pytest.mark.slow  # exports


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


@torch.no_grad()
def test_step_reads_the_keys_and_values_that_prefill_has_written(exported):
    """Which it does not where each method has a cache of its own."""
    model, folder = exported("dream")
    prompt = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = model(prompt).logits[:, 7:11]
    columns, keep = torch.arange(12).repeat(3, 1), torch.arange(4).repeat(3, 1)
    block = [each[:, 7:12].contiguous() for each in (prompt, columns, torch.full_like(columns, 12))]
    logits = []
    for has_prefill in (False, True):
        methods = DiffusionEdge.from_pretrained(folder, num_threads=1).methods
        if has_prefill:
            methods["prefill"].execute([prompt, columns, torch.full_like(columns, 12), keep])
        logits.append(methods["step"].execute([*block, keep])[0])
    torch.testing.assert_close(logits[1], expected, atol=1e-4, rtol=0)
    assert (logits[0] - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "quantization, bound",
    [
        ("int8", 0.1),
        pytest.param("fp16", 1e-2, marks=pytest.mark.skipif(LAYERS < 2, reason="15 seconds: DLLM_HF_LAYERS=3")),
        pytest.param("int4", 0.5, marks=pytest.mark.skipif(LAYERS < 2, reason="40 seconds: DLLM_HF_LAYERS=3")),
    ],
)
def test_fewer_bits_are_smaller_and_close(exported, quantization, bound):
    """`bound`: of the error, in standard deviations of the logits; of fp16 the largest, of the others the root mean square."""
    model, folder = exported("llada", quantization)
    tokens = torch.randint(0, 300, (3, 4), generator=torch.Generator().manual_seed(1))
    columns = torch.arange(4).repeat(3, 1)
    methods = DiffusionEdge.from_pretrained(folder, num_threads=1).methods
    (logits,) = methods["step"].execute([tokens, columns, torch.full_like(columns, 4), columns])
    error = (logits - model(tokens).logits).abs() / logits.std()
    assert 0 < (error.max() if quantization == "fp16" else error.square().mean().sqrt()) < bound
    size = (folder / "model.pte").stat().st_size / sum(4 * each.numel() for each in model.parameters())
    # Of a tiny model the description of the program is a good part of the file.
    assert size < {"fp16": 0.75, "int8": 0.6, "int4": 0.55}[quantization]


def test_guidance_conversations_and_streaming_are_those_of_the_model(both):
    model, exported = both("sdar")
    for family in CHECKPOINTS:
        one, other = both(family)
        options = {"max_new_tokens": 8, "cfg_scale": 1.5, "block_length": 4, "remasking_strategy": "sequential"}
        got, expected = (
            each.diffusion_generate(torch.tensor([[5, 6, 7]]), **options).tolist() for each in (one, other)
        )
        assert got == expected
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    first = exported.diffusion_generate(torch.tensor([[5, 6, 7, 8, 9]]), **options)
    text = torch.cat([first.sequences, torch.tensor([[11, 12]])], dim=1)
    shown = []

    class Streamer:
        put, end = staticmethod(lambda tokens: shown.extend(tokens.flatten().tolist())), staticmethod(lambda: None)

    got = exported.diffusion_generate(text, past_key_values=first.past_key_values, streamer=Streamer(), **options)
    assert got.sequences.tolist() == model.diffusion_generate(text, **options).sequences.tolist()
    assert shown == got.sequences[0].tolist()
    assert (
        got.num_forward_passes
        == model.diffusion_generate(
            text, past_key_values=model.diffusion_generate(text[:, :5], **options).past_key_values, **options
        ).num_forward_passes
    )


def test_the_engine_serves_as_many_rows_as_the_file_has(both):
    model, exported = both("sdar")
    prompts, params = [*ROWS[::2], [9, 8, 7], ROWS[0]], SamplingParams(max_tokens=8, temperature=0.0)
    sizes = {"max_num_seqs": exported.max_rows, "max_model_len": exported.max_columns}
    got, expected = (
        [
            each.outputs[0].token_ids
            for each in LLM(one, tokenizer=character_tokenizer(), **sizes).generate(prompts, params)
        ]
        for one in (exported, model)
    )
    assert got == expected
    with pytest.raises(ValueError, match="4 rows do not fit into the 3 of the file"):
        LLM(exported, **{**sizes, "max_num_seqs": 4})
    with pytest.raises(ValueError, match="canvas of 41 columns does not fit into the 40"):
        LLM(exported, **{**sizes, "max_model_len": 41})


# --- LLaDA's class over a file


@pytest.fixture(scope="module")
def llada(exported, tmp_path_factory):
    """The model and the class, of a folder that has a tokenizer."""
    model, folder = exported("llada")
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("llada") / "copy")
    character_tokenizer().save_pretrained(copy)
    return model, LLaDAForCauslLM(copy)


def test_lladas_class_writes_what_the_model_writes_and_prints_each_step(llada, capsys):
    model, exported = llada
    options = {"block_length": 4, "remasking": "low_confidence", "temperature_": 0.0}
    prompts = ["To be or not", "a", "Who is"]
    written = exported.generate(prompts, gen_length=8, max_steps=4, verbose=True, **options, **UNSEEN)
    assert written == [completion(model, each, gen_length=8, max_steps=4, **options) for each in prompts]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"step {step}" for step in (1, 2, 3, 4) for _ in prompts]
    assert all(line.endswith(text) for line, text in zip(lines[-3:], written))


@torch.no_grad()
def test_lladas_tasks_and_logits_are_those_of_the_model(llada):
    model, exported = llada
    chosen = [{**each, "block_length": 4} for each in TASKS[:3]]
    tasks = [InferTask(**each) for each in chosen]
    while not all(task.is_done for task in tasks):
        exported.batch_infer_one_round(tasks)
    assert [task.canvas for task in tasks] == [alone(model, each) for each in chosen]
    inputs = left_pad(ROWS)
    logits = exported.forward_logits_batch(inputs["input_ids"], inputs["attention_mask"])
    for row, text in zip(logits, ROWS):
        torch.testing.assert_close(row[-len(text) :], model(torch.tensor([text])).logits[0], atol=1e-4, rtol=0)


def test_lladas_class_raises_where_the_file_fails(llada, monkeypatch):
    """There are no other logits to go on with."""

    class Failing:
        def execute(self, inputs):
            raise RuntimeError("the runtime has failed")

    exported = llada[1]
    monkeypatch.setattr(exported.model, "methods", dict.fromkeys(("prefill", "step"), Failing()))
    for call in (
        lambda: exported.generate("To be", gen_length=4, block_length=4),
        lambda: exported.forward_logits_batch(torch.tensor([[5, 6]])),
        lambda: exported.batch_infer_one_round([InferTask([5, 6], 4, block_length=4)]),
    ):
        with pytest.raises(RuntimeError, match="the runtime has failed"):
            call()


def test_a_file_stands_where_its_path_says_with_its_configuration_beside_it(tmp_path, monkeypatch):
    character_tokenizer().save_pretrained(tmp_path / "source")
    model = new_model("dream")
    model.config._name_or_path = str(tmp_path / "source")
    monkeypatch.setattr(edge_export, "_lowered", lambda *args: b"program")
    path = export_model(model, EXAMPLE, tmp_path / "out" / "dream.pte")
    assert path == tmp_path / "out" / "dream.pte" and path.read_bytes() == b"program"
    for name in ("tokenizer.json", "config.json", "generation_config.json", FORMAT.description):
        assert (tmp_path / "out" / name).is_file()
    with pytest.raises(ValueError, match="holds .*config.json.* already: give `output_path` a folder of its own"):
        export_model(model, EXAMPLE, tmp_path / "out" / "other.pte")


def test_a_file_says_what_it_takes_to_programs_without_python(exported):
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(exported("dream")[1] / "model.pte")
    numbers = {name: program.load_method(name).execute([])[0] for name in program.method_names - {"prefill", "step"}}
    limits = {"max_rows": 3, "max_columns": 40, "max_block_length": 4, "step_window": 5}
    assert numbers == {**limits, "vocab_size": 320, "logits_shift": 1, "sees_earlier_blocks": 0, "mask_token_id": 300}


# --- what is refused


@pytest.mark.parametrize(
    "family, reason", [("gla_dream", "recurrent states"), ("sdar_moe", "experts"), ("llada_moe", "experts")]
)
def test_families_without_such_a_program_are_refused_by_name(tmp_path, family, reason):
    model = new_model(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*{reason}"):
        export_model(model, EXAMPLE, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = new_model("dream")
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        export_model(new_model("dream").half(), EXAMPLE, tmp_path / "out")
    with pytest.raises(ValueError, match="quantization='int2'"):
        export_model(model, EXAMPLE, tmp_path / "out", "int2")
    with pytest.raises(ValueError, match="there already"):
        export_model(model, EXAMPLE, tmp_path)
    with pytest.raises(ValueError, match="has 2 columns"):
        export_model(model, (torch.zeros(1, 2, dtype=torch.long),), tmp_path / "out")
    with pytest.raises(ValueError, match="`example_inputs` must be"):
        export_model(model, torch.zeros(1, 8, dtype=torch.long), tmp_path / "out")
    with pytest.raises(ValueError, match="block_length=-1"):
        export_model(model, EXAMPLE, tmp_path / "out", block_length=-1)


@pytest.mark.parametrize(
    "options, prompts, message",
    [
        ({"max_new_tokens": 4}, 4, "4 rows do not fit into the 3 of the file"),
        ({"max_new_tokens": 4, "cfg_scale": 1.0}, 2, "4 rows do not fit .*guidance"),
        ({"max_new_tokens": 50}, 1, "canvas of 52 columns does not fit into the 40"),
        ({"max_new_tokens": 8, "block_length": 8}, 1, "block of 8 positions is longer than the 4.*`block_length=4`"),
        ({"max_new_tokens": 8}, 1, "block of 8 positions"),  # Dream's default: all masks are one block
        ({"max_new_tokens": 4, "cache_policy": "block"}, 1, "cache_policy='block'.*choose one of none, prefix, dual"),
    ],
)
def test_what_the_file_does_not_take_is_refused_before_the_first_pass(both, monkeypatch, options, prompts, message):
    exported = both("dream")[1]
    monkeypatch.setattr(exported, "methods", {})
    with pytest.raises(ValueError, match=message):
        exported.diffusion_generate(torch.tensor([[5, 6]] * prompts), **options)


def test_a_conversation_whose_cache_another_call_has_overwritten_is_refused(both):
    exported = both("sdar")[1]
    options = {"max_new_tokens": 4, "return_dict_in_generate": True}
    first = exported.diffusion_generate(torch.tensor([[5, 6, 7, 8]]), **options)
    exported.diffusion_generate(torch.tensor([[9, 9]]), **options)
    text = torch.cat([first.sequences, torch.tensor([[11]])], dim=1)
    with pytest.raises(ValueError, match="Another call has decoded with this file"):
        exported.diffusion_generate(text, past_key_values=first.past_key_values, **options)


def test_a_truncated_file_is_refused(folder):
    (folder / "model.pte").write_bytes((folder / "model.pte").read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.pte is cut short.*export the model again"):
        DiffusionEdge.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.pte", "config.json", FORMAT.description])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}: export the model again"):
        DiffusionEdge.from_pretrained(folder)


@pytest.mark.parametrize("name, changes, message", other_folders(FORMAT.description, 1))
def test_a_file_of_another_version_or_family_is_refused(folder, name, changes, message):
    change(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        DiffusionEdge.from_pretrained(folder)


def test_a_missing_delegate_or_package_is_named_with_the_remedy(exported, monkeypatch, tmp_path):
    from executorch.runtime import Runtime

    folder = exported("sdar")[1]
    monkeypatch.setattr(type(Runtime.get().backend_registry), "is_available", lambda self, name: False)
    with pytest.raises(ValueError, match="delegate XnnpackBackend"):
        DiffusionEdge.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(ValueError, match=r'pip install "dllm-hf\[edge\]"'):
        DiffusionEdge.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ValueError, match=r'pip install "dllm-hf\[edge\]"'):
        export_model(new_model("dream"), EXAMPLE, tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("name", ["out", "dream.pte"])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error, name):
    def fail(model, folder, *args, **kwargs):
        (folder / "config.json").write_bytes(b"half")
        raise error

    monkeypatch.setattr(edge_export, "_lowered", lambda *args: b"program")
    monkeypatch.setattr(edge_export, "describe", fail)
    with pytest.raises(error):
        export_model(new_model("dream"), EXAMPLE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_generation_configuration_goes_with_the_file(both):
    assert isinstance(both("sdar")[1].generation_config, DiffusionGenerationConfig)


# --- programs without PyTorch


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_program_in_numpy_gives_the_tokens_of_the_model(exported, monkeypatch, family):
    """Its runtime needs Python 3.12: ExecuTorch's own stands in for it."""
    from executorch.runtime import Runtime

    def load_program(file):
        program = Runtime.get().load_program(file)

        def load_method(name):
            method = program.load_method(name)
            run = lambda feeds: method.execute([torch.from_numpy(feed) for feed in feeds])
            return lambda feeds: [torch.as_tensor(each).numpy().copy() for each in run(feeds)]

        return SimpleNamespace(load_method=load_method)

    runtime = SimpleNamespace(get=lambda: SimpleNamespace(load_program=load_program))
    monkeypatch.setitem(sys.modules, "executorch_numpy_runtime", SimpleNamespace(Runtime=runtime))
    program, (model, folder) = load_script("examples/edge_numpy.py"), exported(family)
    options = {"cache_policy": "none", "remasking_strategy": "low_confidence_static", "block_length": 4}
    for prompt in ([5, 6, 7], [9] * 8, [11]):
        text = model.diffusion_generate(torch.tensor([prompt]), max_new_tokens=10, eos_token_id=[], **options)
        assert program.decode(folder / "model.pte", prompt, 10) == text[0, len(prompt) :].tolist()
    with pytest.raises(ValueError, match="4[1-4] columns do not fit into the 40"):
        program.decode(folder / "model.pte", [5], 40)
