"""Decode a file of prompts on all machines of a Ray cluster.

python examples/ray_batch.py hub_configs/sdar-tiny-shakespeare prompts.jsonl results --actors 2

A line of the file is an object with `id` and `prompt`. `results` is a folder, which all machines share; the same command goes
on where a run was interrupted, and tries rows that have failed again.
"""

import argparse

import ray
from ray.data import ActorPoolStrategy

from dllm_hf import SamplingParams
from dllm_hf.scaling import DiffusionPredictor, unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that all machines share, or a repository")
    parser.add_argument("prompts")
    parser.add_argument("results")
    parser.add_argument("--actors", type=int, default=1, help="engines, each with its own GPUs")
    parser.add_argument("--gpus", type=float, default=0, help="of each engine")
    parser.add_argument(
        "--cpus", type=float, default=0.5, help="of each engine; some must be left for reading and writing"
    )
    parser.add_argument("--max-num-seqs", type=int, default=32, help="rows that an engine decodes together")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    ray.init()
    prompts = ray.data.read_json(args.prompts, file_extensions=None)
    rest = unfinished(prompts.repartition(target_num_rows_per_block=args.max_num_seqs), args.results)
    rest.map_batches(
        DiffusionPredictor,
        fn_constructor_kwargs={
            "model": args.model,
            "sampling_params": SamplingParams(max_tokens=args.max_tokens, seed=0),
            "max_num_seqs": args.max_num_seqs,
        },
        batch_size=args.max_num_seqs,
        num_gpus=args.gpus,
        num_cpus=args.cpus,
        # Four blocks at a time, so that the engine does not run empty at the end of one.
        compute=ActorPoolStrategy(size=args.actors, max_concurrent_calls_per_actor=4),
    ).write_json(args.results)


if __name__ == "__main__":
    main()
