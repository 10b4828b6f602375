"""A dataset of Ray: every row once, whoever dies."""

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install "dllm-hf[ray]"')

import ray.data  # noqa: E402
from ray.data import ActorPoolStrategy  # noqa: E402

from dllm_hf import LLM, SamplingParams  # noqa: E402
from dllm_hf.scaling import DiffusionPredictor, unfinished  # noqa: E402

# The run of docs/scaling.md: DLLM_HF_RAY_ROWS=10000
ROWS = int(os.environ.get("DLLM_HF_RAY_ROWS", 300))
BAD = 7  # a row without room for its new tokens
OPTIONS = {"block_length": 4, "denoising_steps": 2, "eos_token_id": []}


class Located(DiffusionPredictor):
    """Tells which process has decoded a row."""

    async def __call__(self, batch):
        return {**await super().__call__(batch), "pid": [os.getpid()] * len(batch["id"])}


def params_of(row: dict) -> SamplingParams:
    return SamplingParams(max_tokens=4 + row["id"] % 8, seed=row["id"], temperature=1.0, options=OPTIONS)


def rows(number: int) -> list[dict]:
    prompts = [{"id": each, "prompt": "abcdefg"[each % 5 :], "source": f"line {each}"} for each in range(number)]
    prompts[BAD]["prompt"] = "a" * 500
    return prompts


def completed(dataset, folder, size: int = 2, **options):
    return dataset.map_batches(
        Located,
        fn_constructor_kwargs={
            "model": folder,
            "sampling_params": params_of,
            "device": "cpu",
            "max_num_seqs": 32,
            **options,
        },
        batch_size=16,
        num_cpus=0.4,
        compute=ActorPoolStrategy(size=size, max_concurrent_calls_per_actor=4),
    )


def results_in(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.json") for line in path.read_text().splitlines()]


def test_with_an_actor_killed_every_row_is_there_once_and_a_second_run_does_what_is_left(cluster, folder, tmp_path):
    killed, dataset = [], ray.data.from_items(rows(ROWS), override_num_blocks=max(ROWS // 50, 6))

    def kill() -> None:
        while len(results_in(tmp_path)) < ROWS // 6:
            time.sleep(0.05)
        os.kill(results_in(tmp_path)[-1]["pid"], signal.SIGKILL)
        killed.append(len(results_in(tmp_path)))

    killer = threading.Thread(target=kill)
    killer.start()
    completed(unfinished(dataset, tmp_path), folder).write_json(str(tmp_path))
    killer.join(10)
    results = results_in(tmp_path)
    assert killed and killed[0] < ROWS
    assert Counter(each["id"] for each in results) == Counter(range(ROWS))
    assert [each["id"] for each in results if each["error"]] == [BAD]
    assert "no room for new tokens" in next(each for each in results if each["error"])["error"]
    assert all(each["source"] == f"line {each['id']}" for each in results)

    sample = results[:: max(ROWS // 16, 1)]
    alone = LLM(folder, device="cpu")
    for each in (each for each in sample if not each["error"]):
        [output] = alone.generate([each["prompt"]], params_of(each), use_tqdm=False)
        completion = output.outputs[0]
        assert (each["text"], each["token_ids"]) == (completion.text, completion.token_ids)

    # As a run leaves it that was killed: one file is not there, and another ends within a line.
    first, second, *_ = sorted(tmp_path.glob("*.json"))
    lost = {each["id"] for each in results_in(tmp_path)}
    first.unlink()
    with second.open("a") as file:
        file.write('{"id": 3, "prom')
    left = {json.loads(line)["id"] for path in tmp_path.glob("*.json") for line in path.read_text().splitlines()[:-1]}
    rest = unfinished(dataset, tmp_path)
    lost -= {each["id"] for each in results_in(tmp_path)}
    assert BAD in lost and {row["id"] for row in rest.take_all()} == lost and len(left) < ROWS
    completed(rest, folder, size=1).write_json(str(tmp_path))
    assert Counter(each["id"] for each in results_in(tmp_path)) == Counter(range(ROWS))
    assert [row["id"] for row in unfinished(dataset, tmp_path).take_all()] == [BAD]


def test_a_row_that_is_wrong_has_its_error_and_the_others_their_texts(folder):
    """Without Ray: what it calls."""
    import asyncio

    import numpy

    predictor = DiffusionPredictor(folder, SamplingParams(max_tokens=8, **{"options": OPTIONS}), device="cpu")
    prompts = numpy.empty(5, dtype=object)
    chat = numpy.array([{"role": "user", "content": "abc"}], dtype=object)
    for index, prompt in enumerate(["abc", numpy.array([0, 1, 2]), chat, None, "ab<mask>"]):
        prompts[index] = prompt
    batch = asyncio.run(predictor({"id": numpy.arange(5), "prompt": prompts}))
    [[text, ids, chatted, filled]] = [
        predictor.llm.generate([*prompts[[0, 0]], "abc:", "ab<mask>"], predictor.sampling_params)
    ]
    wanted = [each.outputs[0] for each in (text, ids, chatted)]
    assert list(batch["id"]) == [0, 1, 2, 3, 4]
    assert (
        list(batch["text"][:3]) == [each.text for each in wanted] and list(batch["error"][[0, 1, 2, 4]]) == [None] * 4
    )
    assert batch["text"][3] is None and "a prompt is a string" in batch["error"][3]
    assert batch["filled_prompt"][4] == filled.outputs[0].filled_prompt and batch["filled_prompt"][0] is None
    predictor.llm.close()


def test_batches_that_an_actor_works_on_at_a_time_are_in_the_engine_together(folder):
    """Without Ray. So it does not run empty at the end of one."""
    import asyncio

    import numpy

    predictor = DiffusionPredictor(folder, SamplingParams(max_tokens=80, options=OPTIONS), device="cpu", max_num_seqs=8)

    async def decode(batches: int) -> int:
        """Forward passes."""
        before = predictor.llm.load().num_forward_passes
        batch = {"id": numpy.arange(4), "prompt": numpy.array(["abc"] * 4, dtype=object)}
        await asyncio.gather(*(predictor(batch) for _ in range(batches)))
        return predictor.llm.load().num_forward_passes - before

    alone, together = asyncio.run(decode(1)), asyncio.run(decode(2))
    assert alone > 30 and together < 1.2 * alone
    predictor.llm.close()
