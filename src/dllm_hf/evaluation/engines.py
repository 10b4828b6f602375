"""The engine that measures decode with."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..engine.llm import LLM
from ..engine.sampling_params import OF_THE_ENGINE, SamplingParams
from ..generation.configuration import canonical_options


def of_requests(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `diffusion_generate` that requests have to name, see [`open_engine`].

    Raises:
        ValueError: one of them is none of a request; the number of new tokens is that of the task.
    """
    rest = {name: value for name, value in canonical_options(options).items() if name not in OF_THE_ENGINE}
    for name in ("max_new_tokens", "max_length"):
        if name in rest:
            raise ValueError(f"`{name}={rest[name]}` is no option here: tasks say how many tokens they ask for.")
    return SamplingParams(options=rest).options


def effective(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What `options` leave to the model filled in; for result files.

    Raises:
        ValueError: an option is wrong, or the model cannot do what it asks for.
    """
    of_requests(options)
    resolved = model.resolve_options(None, options).to_dict()
    left_out = ("max_new_tokens", "max_length", "transformers_version", "return_dict_in_generate")
    return {name: value for name, value in resolved.items() if value is not None and name not in left_out}


def open_engine(
    model: Any, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], batch_size: int, longest: int
) -> LLM:
    """An engine for so many rows at a time.

    Args:
        options: of `diffusion_generate`. longest: tokens of a prompt and what is added to it.
    """
    given = canonical_options(options)
    shared = {OF_THE_ENGINE[name]: value for name, value in given.items() if name in OF_THE_ENGINE}
    # A last block is filled up.
    room = longest + (given.get("block_length") or model.default_block_length or 0)
    room = min(room, getattr(model.config, "max_position_embeddings", None) or room)
    sizes: dict[str, Any] = {"max_num_seqs": batch_size, "max_model_len": room}
    if effective(model, options)["cache_policy"] == "none":
        # Every step feeds whole canvases: a budget for those beside blocks would cut the batch into small passes.
        sizes["max_num_batched_tokens"] = batch_size * room
    return LLM(model, tokenizer=tokenizer, num_cache_tokens=batch_size * (room + 1) + 1, **sizes, **shared)
