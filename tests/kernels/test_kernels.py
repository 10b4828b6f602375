"""Each kernel against its torch twin: on a GPU as it is compiled, elsewhere in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from dllm_hf.fused import stack as fused
from dllm_hf.generation import cache_layers
from dllm_hf.generation.remasking import ABSOLUTE, RELATIVE, RULES, select
from dllm_hf.kernels.attention import canvas_attention, canvas_attention_torch
from dllm_hf.kernels.best_tokens import BLOCK, best_tokens, best_tokens_torch
from dllm_hf.kernels.columns import copy_columns, copy_columns_torch
from dllm_hf.kernels.layers import (
    add_rms_norm,
    add_rms_norm_torch,
    rotate_and_store,
    rotate_and_store_torch,
    swiglu,
    swiglu_torch,
)
from dllm_hf.kernels.selection import select_positions
from dllm_hf.kernels.tiles import number_of_stages
from dllm_hf.kernels.triton import has_kernels

from ..builders import as_list, new_model, pairwise, window_of

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(got, expected, dtype):
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    # The interpreter cuts off what bfloat16 has no room for, instead of rounding.
    assert error < (5e-6 if dtype == torch.float32 else 8e-3 if ON_GPU else 2e-2), float(error)


def attend(function, query, keys, values, lengths, scale, slots=None):
    """`keys`, `values`: `(slots, kv_heads, width, head_dim)`, put into an arena."""
    width = keys.shape[2]
    slots = torch.arange(len(query)) if slots is None else slots
    arenas = (x.transpose(0, 1).flatten(1, 2) for x in (keys, values))
    return function(query, *arenas, lengths, slots.to(DEVICE) * width, width, scale)


def attention_case(batch, window, kv_heads, groups, head_dim, width, lengths, dtype=torch.float32):
    query = random(batch, window, kv_heads * groups, head_dim, dtype=dtype)
    keys, values = (random(batch, kv_heads, width, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    lengths = torch.as_tensor(lengths, dtype=torch.int32, device=DEVICE).expand(batch, window).contiguous()
    for row, length in enumerate(lengths.amax(-1).tolist()):
        # What is not visible is not read: poison.
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    slots = torch.arange(batch).flip(0)  # each row's extent stands where another row's number says
    got = attend(canvas_attention, query, keys[slots], values[slots], lengths, head_dim**-0.5, slots)
    precise = (x.double() for x in (query, keys, values))
    expected = attend(canvas_attention_torch, *precise, lengths, head_dim**-0.5)
    assert got.shape == (batch, window, kv_heads * groups, head_dim) and got.is_contiguous()
    close(got, expected, dtype)


def attention_of_long_canvases(query, keys, values, kv_heads, width, length, scales=None, unspoilt=None, encoding=None):
    """Each key head begins a canvas behind the one before, in memory that they share: another for each head of each row would
    take tens of gigabytes. A head, or a row, that is taken for another reads other columns all the same.

    Args:
        query: `(batch, window, heads, head_dim)`.
        keys, values, scales: of `batch + kv_heads - 1` canvases, one behind the other: `(1, canvases * width, ...)`.
        length: of `width` columns, how many are seen.
        unspoilt: what the twin reads instead of `keys`, `values` and `scales`.
        encoding: of keys and values in 8 bits.
    """
    batch, window = query.shape[:2]
    lengths = torch.full((batch, window), length, dtype=torch.int32, device=DEVICE)
    base = torch.arange(batch, device=DEVICE).flip(0) * width

    def heads(held):
        shape, (_, column, *rest) = (kv_heads, batch * width, held.shape[2]), held.stride()
        return held.as_strided(shape, (width * column, column, *rest))

    of_keys = None if scales is None else heads(scales).contiguous()
    scale, in_bytes = query.shape[-1] ** -0.5, {"scales": of_keys, "encoding": encoding}
    got = canvas_attention(query, heads(keys), heads(values), lengths, base, width, scale, **in_bytes)
    keys, values, scales = unspoilt or (keys, values, scales)
    expected = torch.empty_like(got, dtype=torch.float64)
    # The twin for one of all: it copies what it reads, in the type of the queries.
    for row, rows in enumerate(expected.split(1)):
        for head, result in enumerate(rows.chunk(kv_heads, dim=2)):
            canvas = slice((batch - 1 - row + head) * width, (batch - row + head) * width)
            alone = [each[:, canvas] for each in (keys, values)]
            one = query[row : row + 1].chunk(kv_heads, dim=2)[head].double()
            places = (lengths[row : row + 1], base[:1] * 0, width, scale)
            of_one = None if scales is None else scales[:, canvas]
            result.copy_(canvas_attention_torch(one, *alone, *places, scales=of_one, encoding=encoding))
    close(got, expected, query.dtype)


@pytest.mark.parametrize(
    ("head_dim", "groups"), [(8, 1), (8, 7), (64, 4), (64, 8), (96, 1), (96, 7), (128, 4), (128, 8)]
)
def test_attention_of_every_head_size_and_group(head_dim, groups):
    attention_case(1, 4, 2, groups, head_dim, 150, 131)


@pytest.mark.parametrize("window", [1, 3, 16, 33, 64])
def test_attention_of_windows(window):
    attention_case(2, window, 1, 2, 64, 130, 97)


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 129, 300, 700])
def test_attention_over_canvases(width):
    attention_case(1, 4, 1, 1, 64, width, width)


def test_rows_of_a_batch_see_their_own_lengths():
    attention_case(3, 4, 2, 2, 64, 300, torch.tensor([[300], [1], [130]]))


def test_each_query_sees_its_own_length():
    """The window that writes a finished block and reads for the next one: two ranges."""
    attention_case(1, 8, 2, 2, 64, 200, torch.tensor([[132] * 4 + [136] * 4]))


def test_a_query_that_sees_nothing_gets_zeros():
    query, keys, values = random(1, 2, 2, 64), random(1, 2, 140, 64), random(1, 2, 140, 64, seed=1)
    lengths = torch.tensor([[0, 140]], dtype=torch.int32, device=DEVICE)
    got = attend(canvas_attention, query, keys, values, lengths, 0.1)
    assert (got[:, 0] == 0).all()
    close(got, attend(canvas_attention_torch, query, keys, values, lengths, 0.1), torch.float32)


def test_large_scores_do_not_overflow():
    query, keys, values = 300 * random(1, 2, 2, 64), 300 * random(1, 2, 140, 64), random(1, 2, 140, 64, seed=1)
    lengths = torch.full((1, 2), 140, dtype=torch.int32, device=DEVICE)
    got = attend(canvas_attention, query, keys, values, lengths, 1.0)
    close(got, attend(canvas_attention_torch, query, keys, values, lengths, 1.0), torch.float32)


def test_extents_begin_anywhere_in_the_arena():
    query, keys, values = random(3, 4, 2, 64), random(2, 900, 64), random(2, 900, 64, seed=1)
    lengths = torch.tensor([[250], [3], [90]], dtype=torch.int32, device=DEVICE).expand(3, 4).contiguous()
    base = torch.tensor([333, 5, 600], device=DEVICE)
    got = canvas_attention(query, keys, values, lengths, base, 300, 0.1)
    for row, (begin, length) in enumerate(zip(base.tolist(), (250, 3, 90))):
        alone = (x[None, :, begin : begin + length] for x in (keys, values))
        one = slice(row, row + 1)
        close(got[one], attend(canvas_attention_torch, query[one], *alone, lengths[one], 0.1), torch.float32)


@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.float32), (4, torch.float16)])
def test_runs_of_a_list_are_read_as_rows_of_their_own(groups, dtype):
    """Runs in any order, as long as tiles or shorter, of a row twice, and one without a token. In float16 short and long ones
    have tiles of two sizes."""
    counts, begins = [3, 0, 40, 1, 16], [40, 0, 0, 43, 44]
    query = random(1, 60, 2 * groups, 64, dtype=dtype)
    keys, values = (random(2, 900, 64, dtype=dtype, seed=seed) for seed in (0, 1))
    lengths = torch.randint(0, 290, (1, 60), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    base = torch.tensor([333, 0, 5, 333, 600], device=DEVICE)
    runs = torch.tensor([[9, begin, count] for begin, count in zip(begins, counts)], device=DEVICE)
    arguments = (keys, values, lengths, base, 300, 0.1, runs, 64)
    got = canvas_attention(query, *arguments)
    close(got, canvas_attention_torch(query, *arguments), dtype)
    for number, (begin, count) in enumerate(zip(begins, counts)):
        alone = (query[:, begin : begin + count], keys, values, lengths[:, begin : begin + count], base[number, None])
        if count:
            close(got[:, begin : begin + count], canvas_attention_torch(*alone, 300, 0.1), dtype)


@pytest.mark.parametrize("is_list", [False, True])
def test_rows_read_the_beginning_that_they_share_where_it_stands(is_list):
    """Of which one row sees less than the beginning, and one shares nothing."""
    query, keys, values = random(4, 3, 2, 64), random(2, 900, 64), random(2, 900, 64, seed=1)
    seen, begins, shared = [250, 70, 90, 200], [600, 500, 5, 150], [(33, 100), (33, 100), (0, 0), (40, 37)]
    lengths = torch.tensor(seen, dtype=torch.int32, device=DEVICE)[:, None].expand(4, 3).contiguous()
    places = (torch.tensor(begins, device=DEVICE), 300, 0.1)
    runs = torch.tensor([[9, 3 * row, 3] for row in range(4)], device=DEVICE)
    table = torch.tensor(shared, device=DEVICE).T.contiguous()
    for attend_to in (canvas_attention, canvas_attention_torch):
        if is_list:
            flat = (query.flatten(0, 1)[None], keys, values, lengths.view(1, 12), *places, runs, 4)
            got = attend_to(*flat, shared=table).view_as(query)
        else:
            got = attend_to(query, keys, values, lengths, *places, shared=table)
        for row, (begin, length, (first, number)) in enumerate(zip(begins, seen, shared)):
            columns = [(first if column < number else begin) + column for column in range(length)]
            one, alone = slice(row, row + 1), (x[None, :, columns] for x in (keys, values))
            close(got[one], attend(canvas_attention_torch, query[one], *alone, lengths[one], 0.1), torch.float32)


@pytest.mark.parametrize("is_list, has_beginning", [(False, False), (True, False), (True, True)])
def test_rows_have_columns_of_their_own_within_a_canvas_that_they_share(is_list, has_beginning):
    """Three rows of one canvas: the first reads it as it is, the others have the columns from 70 on, and from 10 on, elsewhere."""
    query, keys, values = random(3, 3, 2, 64), random(2, 900, 64), random(2, 900, 64, seed=1)
    seen, own, beginning = (
        [200, 150, 150],
        [(0, 0, 0), (70, 75, 800), (10, 140, 700)],
        (400, 33) if has_beginning else (0, 0),
    )
    lengths = torch.tensor(seen, dtype=torch.int32, device=DEVICE)[:, None].expand(3, 3).contiguous()
    shared = torch.tensor([beginning] * 3, device=DEVICE).T.contiguous() if has_beginning else None
    tables = {"shared": shared, "own": torch.tensor(own, device=DEVICE).T.contiguous()}
    places = (torch.full((3,), 100, device=DEVICE), 300, 0.1)
    runs = torch.tensor([[9, 3 * row, 3] for row in range(3)], device=DEVICE)
    for attend_to in (canvas_attention, canvas_attention_torch):
        if is_list:
            flat = (query.flatten(0, 1)[None], keys, values, lengths.view(1, 9), *places, runs, 4)
            got = attend_to(*flat, **tables).view_as(query)
        else:
            got = attend_to(query, keys, values, lengths, *places, **tables)
        for row, (length, (first, last, begin)) in enumerate(zip(seen, own)):
            columns = [(beginning[0] if column < beginning[1] else 100) + column for column in range(length)]
            columns[first:last] = range(begin, begin + last - first)
            one, alone = slice(row, row + 1), (x[None, :, columns] for x in (keys, values))
            close(got[one], attend(canvas_attention_torch, query[one], *alone, lengths[one], 0.1), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 8192, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "groups"), [(32, 1), (8, 4), (4, 7), (4, 8)])
def test_attention_of_real_shapes(width, dtype, kv_heads, groups):
    for batch, window in ((1, 32), (8, 32), (2, 4)):
        shape = (1, (batch + kv_heads - 1) * width, 128)
        held = [random(*shape, dtype=dtype, seed=seed) for seed in (1, 2)]
        for each in held:
            each.view(-1, width, 128)[:, width - 5 :] = float("nan")
        query = random(batch, window, kv_heads * groups, 128, dtype=dtype)
        attention_of_long_canvases(query, *held, kv_heads, width, width - 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 100, 4096])
def test_norm_with_and_without_a_residual(size, dtype):
    x, residual = (random(3, 2, size, dtype=dtype, seed=seed) for seed in range(2))
    weight = random(size, dtype=dtype)
    for other in (None, residual):
        for rounds_once in (False, True):
            given = (x, other, weight, 1e-6, rounds_once)
            for got, expected in zip(add_rms_norm(*given), add_rms_norm_torch(*given)):
                close(got, expected, dtype)


def test_the_norm_that_rounds_once_is_pytorch_s():
    x, weight = (random(*shape, dtype=torch.bfloat16).cpu() for shape in ((5, 64), (64,)))
    expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    assert torch.equal(add_rms_norm_torch(x, None, weight, 1e-5, rounds_once=True)[0], expected)
    assert not torch.equal(add_rms_norm_torch(x, None, weight, 1e-5)[0], expected)


def test_the_norm_is_the_library_s():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = random(5, 64)
    norm = LlamaRMSNorm(64, eps=1e-5).to(DEVICE)
    norm.weight.data = random(64)
    close(add_rms_norm_torch(x, None, norm.weight, 1e-5)[0], norm(x), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(dtype):
    gate, up = (4 * random(3, 2, 1500, dtype=dtype)).split([1400, 100], dim=-1)[0].split(700, dim=-1)  # of one product
    got = swiglu(gate, up)
    assert got.is_contiguous()
    close(got, swiglu_torch(gate, up), dtype)


@pairwise(
    sizes=[(2, 2, 64), (4, 1, 96), (7, 1, 128), (2, 2, 8)],  # heads, kv_heads, head_dim
    part=[1, 0.5, 0.25],  # of a head that is rotated
    has_norm=[False, True],
    dtype=[torch.float32, torch.bfloat16],
)
def test_rotation_and_the_columns_of_the_cache(sizes, part, has_norm, dtype):
    heads, kv_heads, head_dim = sizes
    batch, window, width = 2, 3, 20
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    query, key, value = random(batch, window, sum(sizes), dtype=dtype).split(sizes, dim=-1)  # of one product
    cos, sin = (random(batch, window, int(head_dim * part), dtype=dtype, seed=seed) for seed in (3, 4))
    columns = torch.tensor([[0, 7, 19], [24, 25, 26]], device=DEVICE)
    norms = [random(head_dim, dtype=dtype, seed=seed) if has_norm else None for seed in (5, 6)]
    results = []
    for function in (rotate_and_store, rotate_and_store_torch):
        keys, values = torch.zeros(2, kv_heads, batch * width, head_dim, dtype=dtype, device=DEVICE)
        rotated = function(query, key, value, cos, sin, columns, keys, values, *norms, 1e-6)
        results.append((rotated, keys, values))
    for got, expected in zip(*results):
        close(got, expected, dtype)
    written = torch.zeros(batch * width, dtype=torch.bool, device=DEVICE).scatter_(0, columns.flatten(), True)
    assert (results[0][1].abs().sum((0, 2)) > 0).equal(written)


@pytest.mark.parametrize("vocab", [2, 11, 300, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_token_probability_margin_and_entropy(vocab, dtype):
    logits = (3 * random(2, 3, vocab, dtype=dtype)).contiguous()
    mask = vocab - 1
    logits[0, 0, mask] = 20.0  # the mask may be the most probable
    for got, expected in zip(best_tokens(logits, mask), best_tokens_torch(logits, mask)):
        if got.dtype == torch.long:
            assert torch.equal(logits.gather(-1, got[..., None]), logits.gather(-1, expected[..., None]))
            assert (got != mask).all()
        else:
            torch.testing.assert_close(got, expected, atol=3e-6, rtol=3e-5)


def test_of_equal_tokens_the_first_is_the_best():
    logits = torch.zeros(1, 2, 2 * BLOCK + 3, device=DEVICE)
    logits[0, 1, [5, 70, BLOCK + 9]] = 1.0
    assert best_tokens(logits, 0)[0].tolist() == [[1, 5]]


def test_suppressed_tokens_do_not_count():
    logits = random(1, 2, 2 * BLOCK)
    logits[..., :BLOCK] = -torch.inf  # a whole chunk
    for got, expected in zip(best_tokens(logits, 3), best_tokens_torch(logits, 3)):
        torch.testing.assert_close(got, expected, atol=3e-6, rtol=3e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_overflowed_give_no_number(value):
    logits = random(1, 2, 2 * BLOCK)
    logits[0, 0, 5] = value
    _, probability, margin, entropy = best_tokens(logits, 3)
    for score in (probability, margin, entropy):
        assert score[0, 0].isnan() and not score[0, 1].isnan()


@pytest.mark.parametrize("mask", [0, 3])
def test_where_nothing_is_a_number_some_token_is_proposed(mask):
    logits = random(1, 2, 2 * BLOCK)
    logits[0, 0] = float("nan")
    best, probability, _, _ = best_tokens(logits, mask)
    assert 0 <= best[0, 0] < 2 * BLOCK and best[0, 0] != mask
    assert probability[0, 0].isnan() and best[0, 1] == best_tokens_torch(logits, mask)[0][0, 1]


@given(data=st.data())
@settings(max_examples=40)
def test_positions_are_those_that_the_rules_name(data):
    """Ties within rounding too, and scores that are no numbers, which the step has made the lowest."""
    size = data.draw(st.sampled_from([1, 3, 4, 32]))
    score = st.sampled_from([0.0, 0.25, 0.5, 0.5 + 2**-22, 0.50001, 1.0, torch.finfo(torch.float32).min])
    each = [st.lists(score, min_size=size, max_size=size), st.lists(st.booleans(), min_size=size, max_size=size)]
    each += [
        st.sampled_from(RULES),
        st.booleans(),
        st.integers(0, size),
        st.tuples(*[st.sampled_from([0.1, 0.5, 2])] * 3),
    ]
    scores, masked, rule, is_probability, quota, bounds = zip(
        *data.draw(st.lists(st.tuples(*each), min_size=1, max_size=3))
    )
    column = lambda values: torch.tensor(values)[:, None]
    before = (column([RULES.index(name) for name in rule]), torch.tensor(scores))
    behind = (column(is_probability), torch.tensor(masked), column(quota), *torch.tensor(bounds).T[..., None])
    expected = select(frozenset({*rule, "quota"}), *before, *behind)
    ruled, scores, *behind = (x.to(DEVICE) for x in (*before, *behind))
    assert torch.equal(select_positions(RULES, (ABSOLUTE, RELATIVE), ruled, scores, scores, *behind).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_copied_to_several_extents_at_once(dtype):
    arena = random(3, 400, 96, dtype=dtype)
    expected, before = arena.clone(), arena.clone()
    runs = torch.tensor([(10, 200, 70), (10, 300, 33), (10, 390, 1), (90, 350, 2)], device=DEVICE)
    copy_columns_torch(expected, runs, 70)
    copy_columns(arena, runs, 70)
    assert torch.equal(arena, expected) and not torch.equal(arena, before)


@pytest.mark.gpu
def test_a_vocabulary_of_the_real_size():
    logits = 2 * random(8, 32, 152_064, dtype=torch.bfloat16)
    for got, expected in zip(best_tokens(logits, 151_666)[1:], best_tokens_torch(logits, 151_666)[1:]):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family, tokens_at_a_time",
    [("llada", 5), ("dream", 8192), ("sdar_moe", 8192), ("llada2", 5)],
)
def test_a_decoder_on_the_kernels_has_the_library_s_logits(family, tokens_at_a_time, monkeypatch):
    monkeypatch.setattr(fused, "MLP_CHUNK", tokens_at_a_time)
    for module, name in (
        (fused, "add_rms_norm"),
        (fused, "swiglu"),
        (cache_layers, "rotate_and_store"),
        (cache_layers, "canvas_attention"),
    ):
        monkeypatch.setattr(module, f"{name}_torch", getattr(module, name))
    model = new_model(family).to(DEVICE)
    tokens = torch.randint(60, (2, 8), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    columns = torch.arange(8, device=DEVICE).expand(2, 8)
    keep = torch.tensor([[0, 3, 7], [1, 1, 2]], device=DEVICE)
    with torch.no_grad():
        stack, cache = fused.FusedStack.of(model), model.make_cache(20)
        stack.prepare(cache, 4)
        logits = stack(tokens.flatten(), as_list(window_of(columns, keep, slots=[3, 1])), cache)
        block = {"block_size": 8} if hasattr(model.config, "block_size") else {}
        expected = model(tokens, **block, logits_to_keep=keep).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("room", "head_dim", "stages"),
    [(227, 128, 3), (227, 256, 3), (163, 128, 3), (163, 256, 2), (99, 128, 2), (99, 256, 1), (64, 128, 1)],
    ids=["H200-128", "H200-256", "A100-128", "A100-256", "RTX4090-128", "RTX4090-256", "T4-128"],
)
def test_loads_fit_into_the_shared_memory(room, head_dim, stages, monkeypatch):
    properties = type("Properties", (), {"shared_memory_per_block_optin": room * 1024})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert number_of_stages(64, 64, 2 * head_dim, torch.device("cuda")) == stages


def test_a_gpu_without_triton_gets_the_twins(monkeypatch):
    on_gpu = type("OnGPU", (), {"is_cuda": True})
    monkeypatch.setattr("dllm_hf.kernels.triton.triton", None)
    assert not has_kernels(on_gpu)
    monkeypatch.setattr("dllm_hf.kernels.triton.triton", object())
    assert has_kernels(on_gpu) and not has_kernels(torch.zeros(1))
