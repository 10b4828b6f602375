"""`DiffusionLM`: lm-eval's tasks have the numbers of our own code."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "dllm-hf[evaluation]"')

import lm_eval  # noqa: E402
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


def evaluated(model, tasks):
    """The results, and the answers to each task's requests, of lm-eval."""
    loaded = TaskManager(include_defaults=False).load(tasks)
    found = lm_eval.evaluate(model, loaded, bootstrap_iters=0)
    return found["results"], {name: [each["resps"] for each in found["samples"][name]] for name in found["samples"]}


def ids_of(text: str) -> list[int]:
    return character_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_a_local_task_has_the_numbers_of_our_own_code(family, tasks):
    model, tokenizer = new_model(family), character_tokenizer()
    ours = DiffusionLM(model, tokenizer, batch_size=3, num_samples=16, **OPTIONS)
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
