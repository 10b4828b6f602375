"""The server of `dllm-hf serve` on a Ray cluster: as many replicas as its requests need.

python examples/ray_serve.py hub_configs/llada-tiny-shakespeare --replicas 2

It answers at http://127.0.0.1:8000 until Ctrl-C. For a cluster of its own: `serve run examples.ray_serve:application
model=/shared/SDAR-8B-Chat gpus=1 replicas=8`.
"""

import argparse

from ray import serve

from dllm_hf.scaling import deployment
from dllm_hf.serving import Settings


def application(options: dict[str, str]) -> serve.Application:
    """What `serve run` builds of its `name=value` arguments."""
    return deployment(
        options["model"],
        Settings(name=options["model"].rstrip("/")),
        num_gpus=float(options.get("gpus", 0)),
        autoscaling={"min_replicas": 1, "max_replicas": int(options.get("replicas", 1))},
        max_num_seqs=int(options.get("max_num_seqs", 64)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that all machines share, or a repository")
    parser.add_argument("--gpus", default="0", help="of each replica")
    parser.add_argument("--replicas", default="1", help="at most")
    args = parser.parse_args()
    serve.run(application(vars(args)), blocking=True)


if __name__ == "__main__":
    main()
