"""What Ray does by default that an engine of diffusion suffers from, each seen on a local Ray with two CPUs.

usage: ray_pitfalls.py [serve] [batches] [order] [drain]

serve: requests that a deployment works on at a time, by default and with `max_ongoing_requests=100`.
batches: rows of the batches that `map_batches` makes without `batch_size`, and what it says with `num_gpus`.
order: whether rows come back in their order.
drain: part of an engine's slots in use, over all its passes: a synchronous actor, an asynchronous one, and one that works on
four blocks at a time.
"""

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

import ray
import ray.data
from ray import serve
from ray.data import ActorPoolStrategy
from serving_online import tiny

from dllm_hf import LLM, SamplingParams
from dllm_hf.scaling import DiffusionPredictor

SLOTS = 16


def params_of(row: dict) -> SamplingParams:
    return SamplingParams(max_tokens=8 * (1 + row["id"] % 12), denoising_steps=2, ignore_eos=True, seed=0)


class Synchronous:
    def __init__(self, model: str):
        self.llm = LLM(model, device="cpu", max_num_seqs=SLOTS)

    def __call__(self, batch):
        params = [params_of({"id": int(each)}) for each in batch["id"]]
        outputs = self.llm.generate([[1, 2, 3]] * len(params), params, use_tqdm=False)
        passes = [output.outputs[0].num_forward_passes for output in outputs]
        return {"num_forward_passes": passes, "engine": [self.llm.load().num_forward_passes] * len(passes)}


class Asynchronous(DiffusionPredictor):
    async def __call__(self, batch):
        batch["prompt"] = [[1, 2, 3]] * len(batch["id"])
        found = await super().__call__(batch)
        return {
            "num_forward_passes": found["num_forward_passes"],
            "engine": [self.llm.load().num_forward_passes] * len(batch["id"]),
        }


class Counting:
    def __init__(self):
        self.now = self.most = 0

    async def __call__(self) -> int:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.5)
        self.now -= 1
        return self.most


def count_requests() -> None:
    for options in ({}, {"max_ongoing_requests": 100}):
        handle = serve.run(serve.deployment(Counting, **options).bind())
        answers = [handle.remote() for _ in range(20)]
        print(f"serve {options}: {max(each.result() for each in answers)} of 20 requests at a time")
    serve.shutdown()


def see_batches() -> None:
    rows = ray.data.range(2000, override_num_blocks=2)
    for options in ({}, {"batch_size": 64}):
        sizes = rows.map_batches(lambda batch: {"rows": [len(batch["id"])]}, **options).take_all()
        print(f"batches {options}: {sorted({each['rows'] for each in sizes})} rows")
    try:
        rows.map_batches(Synchronous, fn_constructor_args=("",), num_gpus=1, compute=ActorPoolStrategy(size=1))
    except ValueError as error:
        print(f"batches num_gpus=1: {error}")


class Waiting:
    async def __call__(self, batch):
        await asyncio.sleep(0.3 if batch["id"][0] < 500 else 0)
        return batch


def see_order() -> None:
    rows = ray.data.range(2000, override_num_blocks=16)
    found = rows.map_batches(Waiting, batch_size=64, num_cpus=0.4, compute=ActorPoolStrategy(size=2)).take_all()
    ids = [each["id"] for each in found]
    moved = sum(found != index for index, found in enumerate(ids))
    print(f"order: {moved} of {len(ids)} rows are not where they were")


def see_draining() -> None:
    model, _, _ = tiny()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        more = {"sampling_params": params_of, "device": "cpu", "max_num_seqs": SLOTS}
        for name, actor, arguments, calls in (
            ("synchronous", Synchronous, {}, 1),
            ("asynchronous", Asynchronous, more, 1),
            ("asynchronous, four blocks at a time", Asynchronous, more, 4),
        ):
            found = (
                ray.data.range(640, override_num_blocks=20)
                .map_batches(
                    actor,
                    fn_constructor_kwargs={"model": folder, **arguments},
                    batch_size=32,
                    num_cpus=0.5,
                    compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=calls),
                )
                .take_all()
            )
            used = sum(each["num_forward_passes"] for each in found) / max(each["engine"] for each in found) / SLOTS
            print(f"drain, {name}: {used:.2f} of the slots in use")


PARTS = {"serve": count_requests, "batches": see_batches, "order": see_order, "drain": see_draining}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=[*PARTS])
    args = parser.parse_args()
    # Workers inherit the environment.
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)])
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    print(f"ray {ray.__version__}")
    for part in args.parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
