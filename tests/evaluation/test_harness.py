"""`DiffusionLM`: lm-eval's tasks have the numbers of our own code."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "dllm-hf[evaluation]"')

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dllm_hf.evaluation.harness import DiffusionLM  # noqa: E402

from ..builders import character_tokenizer, generate, new_model  # noqa: E402

OPTIONS = {"steps": 4, "block_length": 4, "remasking_strategy": "low_confidence_static"}
DOCUMENTS = [
    {"question": "the cat", "choices": [" sat", " on a mat"], "answer": 1},
    {"question": "a dog", "choices": [" ran", " hid and was found"], "answer": 0},
    {"question": "", "choices": ["hello", "no"], "answer": 0},
]
KINDS = {
    "texts": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["zz"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "continuations": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "documents": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[0]}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local tasks, one of each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(each) + "\n" for each in DOCUMENTS)
    (folder / "data.jsonl").write_text(lines)
    files = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{question}}"}
    common |= {"target_delimiter": "", "num_fewshot": 0}
    return [{**common, "task": name, **kind} for name, kind in KINDS.items()]


def evaluated(model, tasks, limit=None):
    """The results, and the answers to each task's requests, of lm-eval."""
    loaded = TaskManager(include_defaults=False).load(tasks)
    found = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    return found["results"], {name: [each["resps"] for each in found["samples"][name]] for name in found["samples"]}


def ids_of(text: str) -> list[int]:
    return character_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_a_local_task_has_the_numbers_of_our_own_code(family, tasks):
    model, tokenizer = new_model(family), character_tokenizer()
    ours = DiffusionLM(model, tokenizer, batch_size=16, num_samples=16, **OPTIONS)
    results, answers = evaluated(ours, tasks)

    def bound(given: str, scored: str) -> float:
        ids = torch.tensor([[*ids_of(given), *ids_of(scored)]])
        labels = ids.clone()
        labels[:, : len(given)] = -100
        return model.log_likelihood(ids, labels=labels, num_samples=16).log_likelihood.item()

    for document, texts, choices, [continuation], [total] in zip(DOCUMENTS, *answers.values(), strict=True):
        question, options = document["question"], document["choices"]
        new = generate(model, [ids_of(question)], max_new_tokens=8, **OPTIONS).sequences[0, len(question) :]
        assert texts == [[tokenizer.decode(new, skip_special_tokens=True)]]
        for [[value, _]], choice in zip(choices, options):
            assert value == pytest.approx(bound(question, choice), rel=1e-5)
        answer = options[document["answer"]]
        new = generate(model, [ids_of(question)], max_new_tokens=len(answer), eos_token_id=[], **OPTIONS)
        is_greedy = new.sequences[0, len(question) :].tolist() == ids_of(answer)
        assert continuation == [(pytest.approx(bound(question, answer), rel=1e-5), is_greedy)]
        assert total == [pytest.approx(bound("", question + options[0]), rel=1e-5)]
    best = [max((0, 1), key=lambda index: bound(each["question"], each["choices"][index])) for each in DOCUMENTS]
    right = [choice == each["answer"] for choice, each in zip(best, DOCUMENTS)]
    assert results["choices"]["acc,none"] == pytest.approx(sum(right) / 3)
    whole = [each["question"] + each["choices"][0] for each in DOCUMENTS]
    bytes_ = sum(len(text) for text in whole)
    assert results["documents"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-sum(bound("", text) for text in whole) / bytes_), rel=1e-5
    )
    info = ours.get_model_info()
    assert info["generation"]["block_length"] == 4 and info["num_samples"] == 16


def test_a_length_of_the_models_own_that_tasks_replace_is_not_in_the_results():
    model = new_model("llada")
    model.generation_config.max_length = 20
    generation = DiffusionLM(model, character_tokenizer()).get_model_info()["generation"]
    assert "block_length" in generation and "max_length" not in generation


def test_a_local_task_has_the_same_texts_through_the_server(tasks):
    pytest.importorskip("tenacity", reason='needs the client: pip install "lm_eval[api]"')
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from ..serving.served import NAME, serving, tiny_llm

    llm = tiny_llm("sdar")
    ours = DiffusionLM(llm.model, llm.tokenizer, batch_size=4)
    with serving(llm) as server:
        url = {"base_url": f"{server.url}/v1/completions", "model": NAME}
        client = LocalCompletionsAPI(**url, tokenizer_backend=None, tokenized_requests=False, max_retries=1)
        through_the_server = evaluated(client, tasks[:1], limit=2)  # it takes no empty prompt
        refused = server.complete("abc", echo=True, logprobs=1)
    assert through_the_server == evaluated(ours, tasks[:1], limit=2)
    assert (refused.status, "lm-eval's model `dllm`" in refused.error["message"]) == (400, True)


def test_a_chat_is_what_the_template_makes_of_it_up_to_the_end_of_a_turn(tasks):
    """With an example as turns before, and of the likelihoods as well."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{% if not loop.last or "
        "add_generation_prompt %}<turn>{% endif %}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
    )
    prompt = "user: a dog<turn>assistant: ran<turn>user: the cat<turn>answer:"
    whole = generate(new_model("llada"), [ids_of(prompt)], max_new_tokens=8, **OPTIONS).sequences[0].tolist()
    tokens = whole[len(ids_of(prompt)) :]
    model = new_model("llada", eot_token_id=tokens[3])  # as if it ended turns
    ours = DiffusionLM(model, tokenizer, batch_size=4, num_samples=16, **OPTIONS)
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "bootstrap_iters": 0}
    some = [{**task, "fewshot_split": "train", "num_fewshot": 1} for task in (tasks[0], tasks[2])]
    for task in some:
        folder = Path(task["dataset_kwargs"]["data_files"]["test"]).parent
        (folder / "turn.jsonl").write_text(json.dumps({**DOCUMENTS[1], "choices": ["ran"]}) + "\n")
        files = {"test": str(folder / "data.jsonl"), "train": str(folder / "turn.jsonl")}
        task["dataset_kwargs"] = {**task["dataset_kwargs"], "data_files": files}
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(ours, tasks=some, limit=1, task_manager=manager, **options)["samples"]
    [text], [continuation] = found["texts"], found["continuations"]
    assert text["arguments"][0][0] == continuation["arguments"][0][0] == prompt
    end = tokens.index(model.config.eot_token_id) + 1  # with its text, since it is none of the special tokens
    assert end < 8 and text["resps"] == [[tokenizer.decode(tokens[:end])]]
    ids = torch.tensor([ids_of(prompt + DOCUMENTS[0]["choices"][1])])
    labels = ids.clone()
    labels[:, : len(ids_of(prompt))] = -100
    bound = model.log_likelihood(ids, labels=labels, num_samples=16).log_likelihood.item()
    assert continuation["resps"][0][0][0] == pytest.approx(bound, rel=1e-5)


WRONG = {
    "`batch_size` must be an integer": {"batch_size": "auto"},
    "`max_length=200` is more than the 128 positions": {"max_length": 200},
    "`cache_policy='dual'` is not possible with SDARForCausalLM": {"cache_policy": "dual"},
    "`stepz` is not an option": {"stepz": 4},
    "`max_new_tokens=5` is no option here": {"gen_length": 5},
    "`cfg_scale` is no option of a request": {"cfg_scale": 1.5},
    "`tokenizer` is missing": {"tokenizer": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_by_name(message):
    arguments = {"pretrained": new_model("sdar"), "tokenizer": character_tokenizer(), **WRONG[message]}
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffusionLM(**arguments)


def test_long_texts_are_measured_in_pieces_and_long_contexts_lose_their_beginning(tasks):
    """Each piece is given the token before it."""
    model, text = new_model("dream"), "abcdefghij" * 3
    ours = DiffusionLM(model, character_tokenizer(), max_length=16, num_samples=4)
    [total] = ours.loglikelihood_rolling([request(text)], disable_tqdm=True)
    expected = 0.0
    for given, scored in [("", text[:15]), (text[14], text[15:30])]:
        ids = torch.tensor([ids_of(given + scored)])
        labels = ids.clone()
        labels[:, : len(given)] = -100
        expected += model.log_likelihood(ids, labels=labels, num_samples=4).log_likelihood.item()
    assert total == pytest.approx(expected, rel=1e-5)
    answers = [ours.loglikelihood([request(context, "abc")], disable_tqdm=True) for context in (text, text[-13:])]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="continuation of 17 tokens is longer than `max_length=16`"):
        ours.loglikelihood([request("a", "b" * 17)], disable_tqdm=True)


@pytest.mark.slow
def test_the_command_of_lm_eval_knows_the_model_by_its_name(tmp_path, tasks):
    """With the arguments that it has for every model."""
    new_model("dream").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "task.json").write_text(json.dumps(tasks[0]))
    (tmp_path / "task.json").rename(tmp_path / "task.yaml")  # JSON is YAML
    arguments = ["--model", "dllm", "--model_args", f"pretrained={tmp_path / 'model'},cache_policy=dual,steps=4"]
    arguments += [
        "--include_path",
        str(tmp_path),
        "--tasks",
        "texts",
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    command = [sys.executable, "-m", "dllm_hf.evaluation", *arguments, "--batch_size", "4", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert (
        found["config"]["generation"]["cache_policy"] == "dual" and found["config"]["usage"]["generated_tokens"] == 24
    )
    ours = DiffusionLM(new_model("dream"), character_tokenizer(), batch_size=4, cache_policy="dual", steps=4)
    [samples] = (tmp_path / "out").rglob("samples_texts_*.jsonl")
    texts = [json.loads(line)["resps"] for line in samples.read_text().splitlines()]
    assert texts == evaluated(ours, tasks[:1])[1]["texts"]


def request(*arguments):
    return Instance("loglikelihood", {}, arguments, 0)
