"""`deployment`: the server's application on Ray Serve."""

import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from ..engine import LLM
from ..serving import Settings, create_app


@serve.ingress()
class DiffusionServer:
    """One replica: an `LLM` behind the application of [`dllm_hf.serving`], whose lifespan Serve runs."""

    def __init__(self, model: str | os.PathLike, settings: Settings, options: dict[str, Any]):
        self.application = create_app(LLM(model, **options), settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.application

    def check_health(self) -> None:
        """Serve replaces a replica in which this raises: its engine has failed."""
        self.application.state.api.engine.check()


def deployment(
    model: str | os.PathLike,
    settings: Settings,
    *,
    num_gpus: float,
    autoscaling: dict[str, Any] | None = None,
    max_num_seqs: int = 64,
    **options: Any,
) -> serve.Application:
    """An application for `serve.run`, with the endpoints of `dllm-hf serve`.

    Args:
        model: a folder or a repository, which every machine can read.
        settings: of the server. Clients see `name`.
        num_gpus: of each replica: `data_parallel_size` times `tensor_parallel_size`; 0 on CPUs.
        autoscaling: of Serve's `AutoscalingConfig`; by default one replica. `target_ongoing_requests`, how many requests a
            replica should have, is `max_num_seqs` here: by Serve's own default of 2 every third request wants a replica.
        max_num_seqs: completions that a replica decodes together. It takes twice as many requests, so that the next ones
            are there when some end: by Serve's own default, `max_ongoing_requests=5`, most slots would stay empty.
        options: of [`LLM`].
    """
    wanted = {"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": max_num_seqs, **(autoscaling or {})}
    made = serve.deployment(
        max_ongoing_requests=2 * max_num_seqs,
        autoscaling_config=wanted,
        ray_actor_options={"num_gpus": num_gpus},
    )(DiffusionServer)
    return made.bind(model, settings, {"max_num_seqs": max_num_seqs, **options})
