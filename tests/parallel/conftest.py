"""Groups of processes, which are forked from one that has imported PyTorch: each would take seconds to import it."""

import json
import multiprocessing

import pytest
import torch
from torch import distributed

from ..builders import BUILDERS, character_tokenizer, new_model
from ..generation.recorded_graphs import DEVICE
from .ranks import FAMILIES, run_rank


@pytest.fixture(scope="session")
def context():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    if DEVICE == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dllm_hf"])
    return context


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A model of each family."""
    root = tmp_path_factory.mktemp("families")
    # The library's products of experts take rows of a multiple of 16 bytes, also in four processes.
    sizes = {name: {"moe_intermediate_size": 32} for name in ("sdar_moe", "llada2")}
    sizes["llada_moe"] = {"expert_intermediate_size": 32}
    for family in BUILDERS:
        new_model(family, **sizes.get(family, {})).save_pretrained(root / family)
    return root


@pytest.fixture(scope="session")
def sdar(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdar")
    new_model("sdar").save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def outcomes_of(context, folders, request):
    """`size -> outcomes`: what so many processes find, by family, of those that were asked for."""
    found: dict[int, dict] = {}
    params = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {each.params["outcome"] for each in params if each is not None and "outcome" in each.params}

    def outcomes(size: int) -> dict:
        if DEVICE == "cuda" and torch.cuda.device_count() < size:
            pytest.skip(f"needs {size} GPUs")
        if size not in found:
            families = [family for family in FAMILIES[size] if (size, family) in asked]
            processes = [context.Process(target=run_rank, args=(folders, rank, size, families)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(600 if DEVICE == "cuda" else 300)  # where each family's kernels are compiled
                if process.exitcode is None:
                    process.kill()
            assert [process.exitcode for process in processes] == [0] * size
            found[size] = json.loads((folders / f"outcomes-{size}.json").read_text())
        return found[size]

    return outcomes
