"""Extents of one arena: never two in one column, gaps closed when they are needed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_hf.generation.extents import Extents

COLUMNS, SLOTS = 40, 5


class Arena:
    """What stands in each column, moved as the extents say."""

    def __init__(self):
        self.columns = [None] * COLUMNS
        self.moves = 0
        self.extents = Extents(SLOTS, COLUMNS, 20, torch.device("cpu"), self.move)

    def move(self, moves):
        end = moves[0][1]
        for source, target, size in moves:
            assert target < source and target == end
            self.columns[target : target + size] = self.columns[source : source + size]
            end += size
        self.moves += 1

    def run_of(self, slot):
        begin = self.extents.begin_of(slot)
        return self.columns[begin : begin + self.extents.size_of(slot)]

    def fill(self, slot):
        begin, size = self.extents.begin_of(slot), self.extents.size_of(slot)
        self.columns[begin : begin + size] = [(slot, column) for column in range(size)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 20)), max_size=30))
def test_what_stands_in_an_extent_stays_whatever_the_others_do(actions):
    """A size of 0 releases. Every extent that fits into the free columns is given, wherever the gaps are."""
    arena, held = Arena(), {}
    extents = arena.extents
    for slot, size in actions:
        if size == 0:
            extents.release(slot)
            held.pop(slot, None)
        else:
            free = COLUMNS - 1 - sum(held.values()) + held.pop(slot, 0)
            assert extents.acquire(slot, size) == (size <= free)
            if size <= free:
                held[slot] = size
                arena.fill(slot)
        assert extents.free == COLUMNS - 1 - sum(held.values())
        taken = set()
        for other, length in held.items():
            assert arena.run_of(other) == [(other, column) for column in range(length)]
            columns = set(range(extents.begin_of(other), extents.begin_of(other) + length))
            assert 0 not in columns and not columns & taken and max(columns) < COLUMNS
            assert (int(extents.base[other]), int(extents.size[other])) == (min(columns), length)
            taken |= columns
    for slot in set(range(SLOTS)) - held.keys():
        assert (int(extents.base[slot]), int(extents.size[slot])) == (0, 1)  # the arena's scratch column


def test_an_extent_can_shrink_where_it_is():
    arena = Arena()
    arena.extents.acquire(0, 20)
    arena.fill(0)
    arena.extents.shrink(0, 5)
    assert arena.run_of(0) == [(0, column) for column in range(5)] and arena.extents.free == COLUMNS - 1 - 5
    assert arena.extents.acquire(1, 20) and arena.moves == 0
