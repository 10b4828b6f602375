"""The kernels of a GLADream's denoising step against their torch twins, and these against the layer's scans."""

import pytest
import torch

pytest.importorskip("triton")

from dllm_hf.gla_dream.kernels_gla_dream import (
    mix_scans,
    mix_scans_torch,
    move_states,
    move_states_torch,
    read_block,
    read_block_torch,
    short_convolutions,
    short_convolutions_torch,
)

from ..builders import pairwise
from .test_kernels import DEVICE, close, random


def arguments(size, heads, kv_heads, key_dim, value_dim, rank, dtype, batch=2):
    sizes = [heads * key_dim, kv_heads * key_dim, kv_heads * value_dim, rank]
    products = random(batch, size, sum(sizes), dtype=dtype).split(sizes, dim=-1)  # of one product
    angles = 3 * random(batch, size, key_dim // 2).repeat(1, 1, 2)
    return {
        **dict(zip(("query", "key", "value", "low_rank"), products)),
        "decay_weight": random(kv_heads * key_dim, rank, dtype=dtype, seed=1),
        "decay_bias": random(kv_heads * key_dim, dtype=dtype, seed=2),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "state": random(batch + 2, heads, key_dim, value_dim, seed=3),
        "slots": torch.tensor([batch + 1, *range(batch - 1)], device=DEVICE),
        "norm_weight": random(value_dim, dtype=dtype, seed=4),
    }


def check(inputs, is_global, dtype, normalizer=16.0):
    """Reading alone, and what the unit between blocks needs."""
    precise = {name: x if name == "slots" else x.double() for name, x in inputs.items()}
    options = {"eps": 1e-6, "gate_logit_normalizer": normalizer, "is_global": is_global}
    for moves_on in (False, True):
        found = read_block(**inputs, **options, moves_on=moves_on)
        for got, expected in zip(found, read_block_torch(**precise, **options, moves_on=moves_on), strict=True):
            assert got.shape == expected.shape and got.is_contiguous()
            close(got, expected, dtype)


@pairwise(
    sizes=[(2, 2, 16, 32), (4, 1, 64, 24), (1, 1, 96, 64)],  # heads, kv_heads, key_dim, value_dim
    dtype=[torch.float32, torch.bfloat16],
    is_global=[False, True],
)
def test_a_block_of_every_head_size_and_group(sizes, dtype, is_global):
    check(arguments(32, *sizes, 16, dtype), is_global, dtype)


@pairwise(
    size_and_rank=[(1, 16), (3, 4), (16, 33), (33, 16), (64, 16)],
    dtype=[torch.float32, torch.bfloat16],
    is_global=[False, True],
)
def test_blocks_of_every_size_and_rank(size_and_rank, dtype, is_global):
    size, rank = size_and_rank
    check(arguments(size, 2, 1, 32, 24, rank, dtype), is_global, dtype)


@pairwise(
    channels=[(32, 32, 64), (128, 64, 24), (16, 1, 100)],
    size_and_taps=[(1, 3), (4, 9), (32, 1), (32, 5), (33, 3), (64, 5)],
    dtype=[torch.float32, torch.bfloat16],
)
def test_short_convolutions_of_every_size(channels, size_and_taps, dtype):
    size, taps = size_and_taps
    product = random(2, size, 5 + sum(channels), dtype=dtype)[..., 5:]
    inputs, weights = product.split(channels, dim=-1), [random(each, 1, taps, dtype=dtype, seed=1) for each in channels]
    precise = short_convolutions_torch([x.double() for x in inputs], [x.double() for x in weights])
    for got, expected in zip(short_convolutions(inputs, weights), precise, strict=True):
        assert got.shape == expected.shape and got.stride(2) == 1
        close(got, expected, dtype)


@pytest.mark.parametrize("bias", [-100.0, 100.0], ids=["at the clamp", "none"])
@pytest.mark.parametrize("size", [32, 64])
def test_the_strongest_and_the_weakest_decays(size, bias):
    inputs = arguments(size, 2, 2, 32, 32, 16, torch.float32)
    inputs |= {"decay_bias": inputs["decay_bias"] + bias, "query": 100 * inputs["query"], "key": 100 * inputs["key"]}
    check(inputs, False, torch.float32, normalizer=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, key_dim, value_dim", [(2, 16, 32), (1, 96, 24), (3, 5, 128)])
def test_the_states_of_the_rows_that_move(heads, key_dim, value_dim, dtype):
    state, last_states = random(5, heads, key_dim, value_dim), random(3, 2, heads, key_dim, value_dim)
    slots = torch.tensor([4, 1, 0], device=DEVICE)
    others = -random(3, heads, key_dim).abs(), 3 * random(3, heads * value_dim, dtype=dtype)
    moves = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    before, expected = state.clone(), state.double()
    move_states(state, slots, last_states, *others, moves)
    move_states_torch(expected, slots, last_states.double(), *(x.double() for x in others), moves)
    close(state, expected, torch.float32)
    assert torch.equal(state[1:4], before[1:4])
    assert not torch.equal(state[0], before[0]) and not torch.equal(state[4], before[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, key_dim, value_dim", [(2, 16, 32), (1, 96, 24), (3, 5, 128)])
def test_states_move_over_several_blocks_and_those_before_each_are_returned(heads, key_dim, value_dim, dtype):
    rows, blocks = 4, 5
    state = random(6, heads, key_dim, value_dim)
    inputs = [
        random(rows * blocks, 2, heads, key_dim, value_dim),
        -random(rows * blocks, heads, key_dim).abs(),
        3 * random(rows * blocks, heads * value_dim, dtype=dtype),
    ]
    slots = torch.tensor([5, 1, 0, 3], device=DEVICE)
    moves, one = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([5, 0, 2, 1], [1] * rows))
    steps, expected, precise = [], state.double(), [x.double() for x in inputs]
    of_block = [[x.unflatten(0, (rows, blocks))[:, block] for x in precise] for block in range(blocks)]
    for each in of_block:  # one after the other
        steps.append(expected[slots])
        move_states_torch(expected, slots, *each, one)
    steps.append(expected[slots])
    for move, found, given in ((move_states, state.clone(), inputs), (move_states_torch, state.double(), precise)):
        before = move(found, slots, *given, moves, keeps=True)
        assert before.is_contiguous() and before.dtype == found.dtype
        close(before, torch.stack(steps[:-1], dim=1).flatten(0, 1), torch.float32)
        for row, (slot, number) in enumerate(zip(slots.tolist(), moves.tolist())):
            close(found[slot], steps[number][row], torch.float32)
        assert torch.equal(found[[1, 2, 4]].float(), state[[1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mix_of_the_scans(dtype):
    scans, product = random(2, 3, 2 * 1100, dtype=dtype), 3 * random(2, 3, 2500, dtype=dtype)
    logits, gate = random(2, 3, 1100, dtype=dtype, seed=1), product[..., 900:2000]
    got = mix_scans(scans, logits, gate)
    assert got.is_contiguous()
    close(got, mix_scans_torch(scans.double(), logits.double(), gate.double()), dtype)
    assert got.device.type == DEVICE
