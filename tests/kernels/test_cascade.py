"""Rows that share a beginning read it together: kernel and twin against attention of each row by itself."""

import pytest
import torch

pytest.importorskip("triton")

from dllm_hf.generation.window import Frame, Pays, make_list
from dllm_hf.kernels.attention import Cascade, canvas_attention, canvas_attention_torch

from ..builders import tiny_model
from .test_eight_bit_cache import arena
from .test_kernels import DEVICE, close, random

SLOTS, COLUMNS, WIDTH = 12, 2200, 300


def shared_canvases(has_drafts: bool):
    """Of eight rows that share 150 columns, or the first 64 of them, one of which still computes the last ones; of three that
    share 90; and of one that shares nothing. Where each token reads, and what tokens read together."""
    cache = tiny_model("sdar").make_cache(WIDTH)
    cache.use_arena(SLOTS, COLUMNS, torch.device(DEVICE))
    cache.make_draft_columns(64)
    extents = cache.extents
    for slot in range(SLOTS):
        source, columns = (0, 64 if slot == 5 else 150) if slot < 8 else (8, 90)
        if slot not in (0, 8, 11):
            extents.share(source, slot, columns)
        assert extents.acquire(slot, 250 - slot)
    extents.upload()
    order = sorted(range(SLOTS), key=extents.beginning_of)
    windows = {slot: (160 + 4 * (slot % 3), 4 + 4 * (slot % 2)) for slot in range(SLOTS)} | {0: (100, 70)}
    frames = [Frame(start, start + width, 0, 0, 200, 0, start, 4) for start, width in map(windows.get, order)]
    drafts = None
    if has_drafts:
        copied = [0, 3, 4]
        drafts = [0] * SLOTS + [1] * len(copied)
        frames, order = frames + [frames[row] for row in copied], order + [order[row] for row in copied]
    beginnings = [extents.beginning_of(slot) for slot in order]
    made = make_list(frames, order, SLOTS, COLUMNS, 0, 1024, drafts, beginnings, Pays(16, 1))
    window = made.to(torch.device(DEVICE))
    base, shared, own, _ = cache.locate(window)
    places = {"runs": window.runs, "longest": window.longest, "shared": shared, "own": own}
    return window.lengths[None], base, places, cache.cascade(window)


@pytest.mark.parametrize(
    ("kv_heads", "groups", "head_dim", "dtype", "encoding", "has_drafts"),
    [(2, 1, 64, torch.float32, None, True), (1, 4, 128, torch.float16, None, False)]
    + [(1, 7, 64, torch.bfloat16, "int8", True), (1, 2, 8, torch.float32, "fp8", False)],
)
def test_what_is_read_together_is_what_each_row_would_read(kv_heads, groups, head_dim, dtype, encoding, has_drafts):
    """Beginnings of two lengths, of which rows see different numbers of columns, beside rows that share none; with tokens and
    pieces that are there to fill the list up, and columns that drafts have for themselves."""
    lengths, base, places, cascade = shared_canvases(has_drafts)
    query = random(1, lengths.shape[1], kv_heads * groups, head_dim, dtype=dtype)
    scales, number = None, COLUMNS + 64
    keys, values = (random(kv_heads, number, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    if encoding is not None:
        keys, values, scales = arena(kv_heads, number, head_dim, encoding, spread=1.0)
    places |= {"scales": scales, "encoding": encoding}
    arguments = (lengths, base, WIDTH, head_dim**-0.5)
    exact = (each.double() if encoding is None else each for each in (keys, values))
    expected = canvas_attention_torch(query.double(), *exact, *arguments, **places)
    assert cascade.lengths.max() == 150 and len(cascade.lengths[0].unique()) == 5
    for attend_to in (canvas_attention_torch, canvas_attention):
        got = attend_to(query, keys, values, *arguments, **places, cascade=cascade)
        close(got, expected, dtype)


def test_what_is_read_together_is_read_by_no_row_again():
    """What a row would read by itself of its beginning is no number here."""
    lengths, base, places, cascade = shared_canvases(has_drafts=False)
    query, keys, values = (
        random(1, lengths.shape[1], 2, 64),
        random(2, COLUMNS + 170, 64),
        random(2, COLUMNS + 170, 64, seed=1),
    )
    expected = canvas_attention_torch(query, keys, values, lengths, base, WIDTH, 0.1, **places)
    keys[:, COLUMNS:] = values[:, COLUMNS:] = float("nan")
    begins, shared = places["shared"]
    places["shared"] = torch.stack([torch.where(shared <= cascade.skipped, COLUMNS, begins), shared])
    for attend_to in (canvas_attention_torch, canvas_attention):
        got = attend_to(query, keys, values, lengths, base, WIDTH, 0.1, **places, cascade=cascade)
        close(got, expected, torch.float32)


@pytest.mark.gpu
def test_a_beginning_of_a_real_size_is_read_together():
    """64 rows of SDAR-4B's shape that share 2,000 columns."""
    shared = [(1, 2000)] * 64
    frames = [Frame(2000 + row, 2004 + row, 0, 0, 2100, 0, 0, 0) for row in range(64)]
    flat = make_list(frames, list(range(64)), 64, 5000, 0, 1024, None, shared, Pays(16, 32768))
    window = flat.to(torch.device(DEVICE))
    keys, values = (random(8, 9000, 128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    query = random(1, 256, 32, 128, dtype=torch.bfloat16)
    base = 100 * window.runs[:, 0] + 200
    table = torch.tensor([[1], [2000]], device=DEVICE).repeat(1, len(base))
    places = (window.lengths[None], base, 2200, 128**-0.5, window.runs, window.longest, table)
    begins = torch.ones(len(window.pieces), dtype=torch.long, device=DEVICE)
    cascade = Cascade(window.beginnings[None], begins, window.pieces, 64, window.skipped)
    expected = canvas_attention_torch(query.double(), keys.double(), values.double(), *places)
    close(canvas_attention(query, keys, values, *places, cascade=cascade), expected, torch.bfloat16)
