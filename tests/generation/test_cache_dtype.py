"""`cache_dtype`: keys and values in 8 bits, wherever there is a cache of them. The kernels: kernels/test_eight_bit_cache.py."""

import copy
import itertools
import pickle

import pytest
import torch

from dllm_hf import LLM, SamplingParams
from dllm_hf.engine import engine
from dllm_hf.generation import pool
from dllm_hf.generation.cache import column_bytes_of
from dllm_hf.generation.configuration import CACHE_DTYPES

from ..builders import assert_each_row_is_what_it_is_alone, generate, pairwise, recorded, refused, tiny_model
from .recorded_graphs import both_ways, fresh_model

CALLS = {
    "llada": {"cache_policy": "dual"},
    "dream": {"cache_policy": "prefix", "cfg_scale": 0.7},
    "sdar": {"prefill_chunk_size": 3},
    "llada2": {"editing_threshold": 0.05},
    "nemotron_diffusion": {},
    "fast_dllm_v2": {"block_length": 4, "small_block_size": 2, "use_block_cache": True},
}
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 2, 3]]


def in_turn(values) -> list[tuple]:
    """Each value with one of the types, so that each type has its share."""
    return list(zip(values, itertools.cycle(CACHE_DTYPES)))


def options_of(cache_dtype: str | None, **options) -> dict:
    return {"eos_token_id": [], "cache_dtype": cache_dtype, **options}


@pytest.mark.parametrize(("family", "cache_dtype"), in_turn(CALLS))
def test_the_fast_path_decodes_as_the_plain_one(family, cache_dtype, captured):
    """Graphs, rows of different lengths, blocks that are written beside those that are read; guidance and sub-blocks too."""
    options = options_of(cache_dtype, max_new_tokens=9, block_length=4, denoising_steps=3, logprobs=0) | CALLS[family]
    model = fresh_model(family)
    plain = both_ways(model, **options)
    assert captured
    unlike = both_ways(model, **{**options, "cache_dtype": None})
    assert not plain.logprobs.allclose(
        unlike.logprobs, atol=1e-4, equal_nan=True
    )  # a workspace of its own, and other keys


@pytest.mark.parametrize(("family", "cache_dtype"), in_turn(["llada", "sdar", "nemotron_diffusion"]))
def test_a_row_in_a_batch_is_what_it_is_alone(family, cache_dtype):
    options = options_of(cache_dtype, max_new_tokens=9, block_length=4) | CALLS[family]
    assert_each_row_is_what_it_is_alone(tiny_model(family), [[5, 6, 7, 8, 9, 10, 11], [12, 13], []], **options)


@pytest.mark.parametrize(("family", "cache_dtype"), in_turn(["llada", "sdar"]))
def test_several_steps_in_one_pass_give_what_one_gives(family, cache_dtype, captured):
    """Drafts have columns of their own for their block, in 8 bits too."""
    options = options_of(cache_dtype, max_new_tokens=10, block_length=4, remasking_strategy="low_confidence_static")
    options |= CALLS[family] if family == "llada" else {}
    model = fresh_model(family)
    one, several = (generate(model, [[5, 6, 7, 8], [9]], draft_steps=number, **options) for number in (None, 2))
    assert one.sequences.tolist() == several.sequences.tolist()
    assert several.tokens_per_forward.sum() > one.tokens_per_forward.sum()  # some were accepted


def test_keys_and_values_take_little_more_than_half_the_memory_of_bfloat16(captured):
    for family, in_8_bits in in_turn(["llada", "sdar"]):
        model = fresh_model(family, head_dim=64) if family == "sdar" else fresh_model(family)
        model = model.bfloat16()
        part = column_bytes_of(model, in_8_bits) / column_bytes_of(model)
        heads = model.model.layers[0].self_attn.head_dim
        assert part == (heads + 2) / (2 * heads)
        assert heads < 32 or part < 0.53
        policy = {"cache_policy": "dual"} if family == "llada" else {}
        sizes = {}
        for cache_dtype in (None, in_8_bits):
            model.release_graphs()
            generate(model, ROWS, **options_of(cache_dtype, max_new_tokens=4), **policy)
            [workspace] = pool._idle[model]
            tensors = workspace.state.layer_tensors()
            sizes[cache_dtype] = sum(each.nbytes for each in tensors)
            columns = workspace.state.layers[0].width * len(ROWS)
            assert sizes[cache_dtype] == columns * column_bytes_of(model, cache_dtype)
        assert sizes[in_8_bits] / sizes[None] == part


CHANGES = {
    "as it is": lambda cache: (cache, [0, 1]),
    "pickled": lambda cache: (pickle.loads(pickle.dumps(cache)), [0, 1]),
    "rows in another order": lambda cache: (cache.batch_select_indices(torch.tensor([1, 0, 0])), [1, 0, 0]),
    "shortened": lambda cache: (cache.crop(3), [0, 1]),
    "reset": lambda cache: (cache.reset(), [0, 1]),
}


@pairwise(change=[*CHANGES], is_fast=[False, True], cache_dtype=[*CACHE_DTYPES])
def test_a_conversation_goes_on(change, is_fast, cache_dtype, request):
    if is_fast:
        request.getfixturevalue("captured")
    model, options = fresh_model("sdar"), options_of(cache_dtype, max_new_tokens=6)
    first = generate(model, ROWS, **options)
    cache = copy.deepcopy(first.past_key_values) if is_fast else first.past_key_values
    changed, rows = CHANGES[change](cache)
    cache = cache if changed is None else changed
    texts = [[*ROWS[0], *first.sequences[0, 9:].tolist(), 20], [*ROWS[1], *first.sequences[1, 9:].tolist(), 21]]
    following = [[*texts[row], *range(30)] for row in rows]  # more columns than the first turn had
    with recorded(model) as calls:
        resumed = generate(model, following, past_key_values=cache, **options)
    assert resumed.sequences.tolist() == generate(model, following, **options).sequences.tolist()
    if not is_fast:
        assert (calls[0]["input_ids"].shape[1] >= len(following[0])) == (change == "reset")


def test_a_conversation_keeps_its_type():
    model = tiny_model("sdar")
    for one, other in (("fp8", None), (None, "fp8"), ("int8", "fp8")):
        cache = generate(model, [[1, 2, 3]], max_new_tokens=4, cache_dtype=one).past_key_values
        refused(model, rf"cache_dtype={one!r}.*cache_dtype={other!r}.*keep", past_key_values=cache, cache_dtype=other)


@pytest.mark.parametrize(
    ("family", "options", "mentions"),
    [
        ("gla_dream", {}, ["cache_dtype='fp8'", "GLADream", "keys and values", "leave it out"]),
        ("llada", {"cache_policy": "none"}, ["cache_dtype='fp8'", "cache_policy", "none"]),
        ("llada", {"cache_policy": "dual", "cache_dtype": "fp16"}, ["cache_dtype='fp16'", "int8, fp8"]),
    ],
)
def test_what_has_no_keys_to_keep_in_8_bits_is_refused(family, options, mentions):
    refused(tiny_model(family), *mentions, **{"cache_dtype": "fp8", **options})


PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
BEGINNING = [(7 * position) % 50 for position in range(24)]


@pairwise(uses_graphs=[False, True], family=["sdar", "llada", "fast_dllm_v2"], cache_dtype=[*CACHE_DTYPES])
def test_the_engine_gives_what_a_call_gives(family, uses_graphs, cache_dtype, monkeypatch, request):
    """Rows that come and go, of different lengths; where blocks see earlier ones alone, with a beginning in common, which is
    read where it stands, and extents that are moved."""
    if uses_graphs:
        request.getfixturevalue("captured")
        monkeypatch.setattr(engine, "are_possible", lambda device: True)
    model = fresh_model(family)
    policy = {"cache_policy": "dual"} if family == "llada" else {}
    room = {"max_num_seqs": 3, "num_cache_tokens": 130}
    llm = LLM(model, cache_dtype=cache_dtype, enforce_eager=not uses_graphs, **room, **policy)
    prompts = [[1, 2, 3], *([*BEGINNING, number] for number in range(4)), [4], [*BEGINNING, 4, 5, 6]]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    state = llm._driver.engine._decoder.workspace.state
    assert {each.dtype for each in state.layer_tensors()} == {torch.uint8, torch.bfloat16}
    block_length = llm.effective_options(PARAMS).block_length
    options = options_of(cache_dtype, max_new_tokens=6, block_length=block_length) | policy
    for prompt, output in zip(prompts, outputs):
        alone = generate(model, [prompt], disable_compile=True, **options).sequences[0, len(prompt) :]
        assert output.outputs[0].token_ids == alone.tolist()


def test_more_columns_fit_into_the_memory_of_a_gpu(monkeypatch):
    """By what a column takes in the type that `LLM`, or the model's own configuration, asks for."""
    model = fresh_model("sdar")
    llm = LLM(model, num_cache_tokens=130)  # not by what other processes leave of the card
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)
    found = [llm._cache_columns(10**9, 100, 0.5, cache_dtype) for cache_dtype in (None, *CACHE_DTYPES)]
    assert found == [int(5e8) // column_bytes_of(model, each) for each in (None, *CACHE_DTYPES)]
    assert found[1] == found[2] > 3 * found[0]  # of float32


def test_an_unknown_type_is_refused_before_the_columns_that_fit_are_counted(monkeypatch):
    """On a GPU its bytes would be asked for first."""
    count = lambda llm, slots, capacity, part, cache_dtype: column_bytes_of(llm.model, cache_dtype)
    monkeypatch.setattr(LLM, "_cache_columns", count)
    with pytest.raises(ValueError, match="`cache_dtype='int9'` is unknown .did you mean 'int8'"):
        LLM(fresh_model("sdar"), cache_dtype="int9")


def test_a_request_cannot_choose_the_type():
    with pytest.raises(ValueError, match="cache_dtype.*one for all requests.*`LLM`"):
        SamplingParams(options={"cache_dtype": "fp8"})


def test_the_model_s_generation_config_may_say_it():
    model = fresh_model("sdar")
    model.generation_config = model.generation_config.updated(cache_dtype="int8")
    llm = LLM(model, num_cache_tokens=130)
    assert llm._driver.engine._decoder.workspace.state.cache_dtype == "int8"
