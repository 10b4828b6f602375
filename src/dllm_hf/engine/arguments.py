"""Arguments of an `LLM`: refused before anything is loaded."""

import os
from typing import Any

import torch

from ..generation.configuration import DiffusionGenerationConfig

# Of these `LLM` takes the model's own where it does not read the model itself.
OF_FILES = {"generation_config": None, "dtype": "auto", "trust_remote_code": False}


def check_arguments(model: Any, arguments: dict[str, Any]) -> None:
    """Raises a `ValueError` for those with which no engine can be made."""
    sizes = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "max_queue", "num_cache_tokens")
    for name in (*sizes, "data_parallel_size", "tensor_parallel_size"):
        if (value := arguments[name]) is not None and (type(value) is not int or value < 1):
            raise ValueError(f"`{name}` must be an integer of at least 1, but is {value!r}.")
    for name in ("enforce_eager", "trust_remote_code"):
        if not isinstance(arguments[name], bool):
            raise ValueError(f"`{name}` must be True or False, but is {arguments[name]!r}.")
    config = arguments["generation_config"]
    if not isinstance(config, (DiffusionGenerationConfig, type(None))):
        raise ValueError(
            f"`generation_config` must be a `DiffusionGenerationConfig`, but is a {type(config).__name__}."
        )
    DiffusionGenerationConfig(draft_steps=arguments["draft_steps"])
    part = arguments["gpu_memory_utilization"]
    if not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise ValueError(f"`gpu_memory_utilization` must be above 0 and at most 1, but is {part!r}.")
    if isinstance(model, (str, os.PathLike)):
        return
    for name, default in OF_FILES.items():
        if arguments[name] != default:
            raise ValueError(
                f"`{name}={arguments[name]!r}` is for a `model` that is read from its files, but it is a loaded "
                f"{type(model).__name__}: change the model itself, and leave `{name}` out."
            )


def gpus_of_replicas(source: Any, arguments: dict[str, Any]) -> list[str] | None:
    """For each replica the GPUs that it sees, as `CUDA_VISIBLE_DEVICES` names them; None where they run on CPUs."""
    count, size = arguments["data_parallel_size"], arguments["tensor_parallel_size"]
    asked = f"`data_parallel_size={count}` with `tensor_parallel_size={size}`"
    if source is None:
        raise ValueError(
            f"{asked}: each process reads the weights itself, so that `model` must be a folder or a repository: save the "
            "model with `save_pretrained`."
        )
    device = torch.device(arguments["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.index is not None:
        raise ValueError(f"{asked}: `device={device}` is one for all: leave it out, or set CUDA_VISIBLE_DEVICES.")
    if device.type != "cuda":
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    if count * size > len(seen):
        raise ValueError(f"{asked} needs {count * size} GPUs, but there are {len(seen)}.")
    return [",".join(seen[index * size : (index + 1) * size]) for index in range(count)]
