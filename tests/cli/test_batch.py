"""`dllm-hf batch`: a file of prompts into a file of results, resumable."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_hf import LLaDAModelLM
from dllm_hf_cli.session import Session

from .conftest import COMMAND

LENGTHS = [3, 9, 1, 6]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{number}", "prompt": "Hello", "max_tokens": length} for number, length in enumerate(LENGTHS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def results_of(path) -> dict[str, list[dict]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["outputs"] for line in lines}


def test_each_line_gets_what_it_gets_alone(run, folder, prompts, tmp_path):
    code, stdout, _ = run("batch", folder, prompts, tmp_path / "results.jsonl", "--max-num-seqs", 2)
    assert (code, stdout) == (0, "")
    results = results_of(tmp_path / "results.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    for number, length in enumerate(LENGTHS):
        [completion] = results[f"p{number}"]
        expected = model.diffusion_generate(ids, max_new_tokens=length)[0, ids.shape[1] :].tolist()
        assert completion["token_ids"] == expected
        assert completion["text"] == tokenizer.decode(expected) and completion["finish_reason"] == "length"


def test_types_and_code_of_the_repository_are_options_of_one_process_too(run, folder, prompts, tmp_path):
    options = ["--dtype", "bfloat16", "--trust-remote-code", "--max-num-seqs", 2]
    assert run("batch", folder, prompts, tmp_path / "results.jsonl", *options)[0] == 0
    assert len(results_of(tmp_path / "results.jsonl")) == len(LENGTHS)


def test_a_folder_without_a_tokenizer_takes_token_ids(run, folder, prompts, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    (tmp_path / "ids").write_text('{"prompt_token_ids": [1, 2, 3]}')
    for each, results in ((folder, "with"), (bare, "without")):
        assert run("batch", each, tmp_path / "ids", tmp_path / results, "--max-tokens", 4)[0] == 0
    [[one], [other]] = (results_of(tmp_path / results)["1"] for results in ("with", "without"))
    assert one["token_ids"] == other["token_ids"] and other["text"] == ""
    code, _, stderr = run("batch", bare, prompts, tmp_path / "out")
    assert code == 2 and "request p0" in stderr and "pass token ids" in stderr and not (tmp_path / "out").exists()


def test_texts_chats_token_ids_and_infilling_are_requests(run, chat_folder, tmp_path):
    lines = [
        {"prompt": "Hello"},
        {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "seed": 1, "temperature": 1.0},
        {"prompt_token_ids": [1, 2, 3]},
        {"prompt": "ab<mask><mask>", "max_tokens": 0},
    ]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("batch", chat_folder, tmp_path / "in", tmp_path / "out", "--max-tokens", 4)[0] == 0
    results = results_of(tmp_path / "out")
    assert list(map(len, (results[name] for name in "1234"))) == [1, 2, 1, 1]
    assert results["4"][0]["filled_prompt"].startswith("ab") and len(results["4"][0]["filled_prompt"]) == 4


def test_an_option_of_a_line_replaces_the_commands_in_its_other_form(run, folder, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "Hello", "max_length": 7}\n{"prompt": "Hello", "denoising_steps": 1}\n')
    assert run("batch", folder, tmp_path / "in", tmp_path / "out", "--max-tokens", 4, "--steps", 4)[0] == 0
    results = results_of(tmp_path / "out")
    assert len(results["1"][0]["token_ids"]) == 2 and results["2"][0]["num_forward_passes"] == 1


def test_a_killed_run_goes_on_where_it_was(run, folder, prompts, tmp_path):
    """Nothing twice, nothing lost, and a line that was being written is written anew."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ("--seed", 3, "--temperature", 1.0)
    run("batch", folder, prompts, whole, *options)
    lines = whole.read_text().splitlines(keepends=True)
    resumed.write_text(lines[0] + lines[1][:20])
    assert run("batch", folder, prompts, resumed, *options)[0] == 0
    assert results_of(resumed) == results_of(whole)
    before = resumed.read_bytes()
    assert run("batch", folder, prompts, resumed, *options)[0] == 0
    assert resumed.read_bytes() == before


def test_a_process_that_was_killed_loses_nothing(run, folder, tmp_path):
    """SIGKILL in the middle of a run: what had been written stays as it is, and the rest gets what an undisturbed run gives."""
    (tmp_path / "in").write_text('{"prompt": "Hello", "max_tokens": 16}\n' * 60)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["batch", folder, str(tmp_path / "in"), str(killed), "--seed", "3", "--temperature", "1"]
    process = subprocess.Popen([*COMMAND, *arguments, "--max-num-seqs", "2"], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (killed.exists() and killed.stat().st_size):
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    written = killed.read_bytes()
    done = written[: written.rindex(b"\n") + 1]
    assert 0 < done.count(b"\n") < 60
    assert run(*arguments)[0] == 0 and killed.read_bytes().startswith(done)
    assert run(*arguments[:3], whole, *arguments[4:])[0] == 0
    assert results_of(killed) == results_of(whole) and len(results_of(whole)) == 60


def test_ctrl_c_keeps_what_is_done(run, folder, prompts, tmp_path, monkeypatch):
    steps, forward = iter(range(1000)), LLaDAModelLM.forward

    def interrupted(self, *args, **kwargs):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LLaDAModelLM, "forward", interrupted)
    code, _, stderr = run("batch", folder, prompts, tmp_path / "out", "--max-num-seqs", 1)
    assert code == 130 and "1 of 4 requests are done: the same command goes on" in stderr
    assert list(results_of(tmp_path / "out")) == ["p0"]
    assert run("batch", folder, prompts, tmp_path / "out")[0] == 0
    assert sorted(results_of(tmp_path / "out")) == ["p0", "p1", "p2", "p3"]


def test_what_failed_is_said_and_tried_again(run, folder, prompts, tmp_path, monkeypatch):
    steps, forward = iter(range(1000)), LLaDAModelLM.forward

    def failing(self, *args, **kwargs):
        if next(steps) == 5:
            raise RuntimeError("boom")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LLaDAModelLM, "forward", failing)
    code, _, stderr = run("batch", folder, prompts, tmp_path / "out", "--max-num-seqs", 1)
    assert code == 1 and "request p1 failed: RuntimeError: boom" in stderr and "1 of 4 requests failed" in stderr
    assert run("batch", folder, prompts, tmp_path / "out")[0] == 0
    assert sorted(results_of(tmp_path / "out")) == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["{"], r"line 1 is no JSON"),
        (['{"prompt": "a"}', "[]"], r"line 2 must be an object with one of prompt, messages, prompt_token_ids"),
        (['{"prompt": "a", "prompt_token_ids": [1]}'], r"line 1 must be an object with one of"),
        (['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": "1"}'], r"line 2 has the id '1' of an earlier line"),
        (['{"prompt": "a", "tempratur": 1}'], r"request 1: .*did you mean 'temperature'"),
        (['{"prompt": "a"}', '{"prompt": 5, "id": "x"}'], r"request x: `prompt` must be a text, but is 5"),
        (['{"prompt_token_ids": [99]}'], r"request 1: .*token id 99"),
        (['{"prompt": "a", "id": null}'], r"line 1 has the id None: an id is a string or an integer"),
        (
            ['{"prompt_token_ids": [1, true]}'],
            r"request 1: `prompt_token_ids` must be a list of integers, but is \[1, true\]",
        ),
        (['{"prompt_token_ids": "ab"}'], r"`prompt_token_ids` must be a list of integers"),
        (['{"messages": []}'], r"`messages` must be a list of messages, but is \[\]"),
        (['{"messages": [1, 2]}'], r"`messages` must be a list of messages"),
        (['{"prompt": null}'], r"`prompt` must be a text, but is null"),
        (['{"prompt": "a", "id": true}'], r"line 1 has the id True: an id is a string or an integer"),
        (['{"prompt": "a", "id": "\\ud800"}'], r"line 1 has the id .*: an id is a string or an integer"),
        (['{"prompt": "a", "stop": 5}'], r"request 1: `stop` must be a string"),
        (['{"prompt": "a", "threshold": 0.5, "factor": 1.0}'], r"request 1: .*belong to different strategies"),
    ],
)
def test_a_wrong_line_is_refused_before_anything_is_written(run, folder, tmp_path, lines, message):
    (tmp_path / "in").write_text("\n".join(lines))
    code, _, stderr = run("batch", folder, tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert re.search(message, stderr), stderr
    assert not (tmp_path / "out").exists()


def test_results_of_other_prompts_are_left_alone(run, folder, prompts, tmp_path):
    (tmp_path / "out").write_text('{"id": "other", "outputs": []}\n')
    code, _, stderr = run("batch", folder, prompts, tmp_path / "out")
    assert code == 2 and "line 1 is no result of these prompts: name another file" in stderr
    assert (tmp_path / "out").read_text() == '{"id": "other", "outputs": []}\n'


def test_results_of_other_options_or_another_model_are_left_alone(run, folder, prompts, tmp_path):
    results = tmp_path / "out"
    assert run("batch", folder, prompts, results)[0] == 0
    before = results.read_bytes()
    moved = shutil.copytree(folder, tmp_path / "moved" / os.path.basename(folder))
    assert run("batch", moved, prompts, results, "--max-num-seqs", 2)[0] == 0  # which is the same model
    other = shutil.copytree(folder, tmp_path / "other")
    for model, options in ((folder, ["--temperature", 1]), (folder, ["--cache-policy", "dual"]), (other, [])):
        code, _, stderr = run("batch", model, prompts, results, *options)
        assert code == 2 and "a result of request p" in stderr and "name another file" in stderr
    prompts.write_text(prompts.read_text().replace("Hello", "Hullo"))
    code, _, stderr = run("batch", folder, prompts, results)
    assert code == 2 and "a result of request p" in stderr
    assert results.read_bytes() == before


def test_results_go_into_a_file_alone(run, folder, prompts, tmp_path):
    """What an earlier run has left cannot be read of a pipe: the command would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        code, _, stderr = run("batch", folder, prompts, place)
        assert code == 2 and f"{place} is no file" in stderr and "name one for the results" in stderr


def test_the_prompts_are_not_taken_for_results(run, folder, prompts):
    prompts.write_text(prompts.read_text().rstrip())
    before = prompts.read_bytes()
    code, _, stderr = run("batch", folder, prompts, prompts)
    assert code == 2 and "holds the prompts: name another file" in stderr
    assert prompts.read_bytes() == before


@pytest.mark.parametrize("content", ["notes without a newline", '{"id": "p0"}\n', '{"id": ["p0"], "outputs": []}\n'])
def test_a_file_that_holds_no_results_is_left_alone(run, folder, prompts, tmp_path, content):
    (tmp_path / "out").write_text(content)
    code, _, stderr = run("batch", folder, prompts, tmp_path / "out")
    assert code == 2 and "name another file for the results" in stderr
    assert (tmp_path / "out").read_text() == content


def test_two_runs_do_not_write_one_file(run, folder, prompts, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "out").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, stderr = run("batch", folder, prompts, tmp_path / "out")
    assert code == 2 and "is being written by another run" in stderr
    assert run("batch", folder, prompts, tmp_path / "out")[0] == 0


def test_blank_lines_a_byte_order_mark_and_other_line_ends_are_read(run, folder, tmp_path):
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n\n')
    assert run("batch", folder, tmp_path / "in", tmp_path / "out", "--max-tokens", 2)[0] == 0
    assert sorted(results_of(tmp_path / "out")) == ["1", "3"]


def test_where_no_results_can_be_written_no_weights_are_read(run, folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "load", lambda self: pytest.fail("weights were read"))
    for path in (tmp_path, tmp_path / "missing" / "out"):
        assert run("batch", folder, prompts, path)[0] == 2


def test_options_of_the_engine_are_checked(run, folder, prompts, tmp_path):
    code, _, stderr = run("batch", folder, prompts, tmp_path / "out", "--max-num-seqs", 0)
    assert code == 2 and "`max_num_seqs` must be an integer of at least 1" in stderr


def test_torchs_generator_is_untouched_by_a_seed(run, folder, prompts, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run("batch", folder, prompts, tmp_path / "out", "--seed", 1)
    assert torch.equal(torch.get_rng_state(), before)
