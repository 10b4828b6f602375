"""Programs that users measure servers with. They need other versions of what this package needs, so that they live in an
environment of their own, whose `bin` must be in PATH."""

import json
import os
import shutil
import subprocess

import pytest

from .served import NAME, serving, tiny_llm

pytestmark = pytest.mark.slow
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "PYTHONPATH": ""}
# Each imports much: one run of each is enough.
needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not in PATH: pip install '{package}'")
    for name, package in (("lm_eval", "lm_eval[api]==0.4.13"), ("guidellm", "guidellm==0.8.1"))
}
TASK = """
task: local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["zzz"]
  max_gen_toks: 8
  temperature: 0.0
metric_list:
  - metric: exact_match
"""


def run(*command: str, folder) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=OFFLINE, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@needs["lm_eval"]
@pytest.mark.parametrize("model, path", [("local-completions", ""), ("local-chat-completions", "chat/")])
def test_lm_eval_scores_the_text_of_the_model(tmp_path, model, path):
    with serving(tiny_llm()) as server:
        questions = ["abc", "de", "f"]
        wanted = "/v1/completions"
        answers = [server.post(wanted, {"prompt": each + ":" * bool(path), "max_tokens": 8}).json for each in questions]
        lines = [
            {"question": question, "answer": answer["choices"][0]["text"] if index else "something else"}
            for index, (question, answer) in enumerate(zip(questions, answers))
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
        arguments = f"model={NAME},base_url={server.url}/v1/{path}completions,num_concurrent=2,max_retries=1"
        run(
            "lm_eval", "--model", model, "--model_args", arguments + ",tokenizer_backend=None,tokenized_requests=False",
            "--include_path", str(tmp_path), "--tasks", "local", "--output_path", str(tmp_path / "out"),
            *(["--apply_chat_template"] if path else []), folder=tmp_path,
        )  # fmt: skip
    [result] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["local"]["exact_match,none"] == pytest.approx(2 / 3)


@needs["guidellm"]
def test_guidellm_finds_no_errors(tmp_path):
    llm = tiny_llm()
    llm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc", "output_tokens_count": 8}\n' * 50)
    with serving(llm) as server:
        run(
            "guidellm", "run", "--backend", f"kind=openai_http,target={server.url},request_format=/v1/chat/completions",
            "--profile", "kind=concurrent,streams=3", "--constraint", "kind=max_requests,count=20",
            "--data", f"kind=json_file,path={tmp_path / 'prompts.jsonl'}",
            "--tokenizer", f"kind=huggingface_auto,model={tmp_path / 'tokenizer'}",
            "--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-progress", folder=tmp_path,
        )  # fmt: skip
        assert server.becomes_idle()
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 20 and not totals["errored"]
