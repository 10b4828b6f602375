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

    def places(self, slot):
        """Columns of the arena in which a slot's canvas stands, as the device reads them."""
        self.extents.upload()
        base, size, shared_base, shared = self.extents.table[:, slot].tolist()
        return [(shared_base if column < shared else base) + column for column in range(size)]

    def text_of(self, slot):
        return [self.columns[place] for place in self.places(slot)]

    def write(self, slot, first=0):
        """The columns from `first` on become a slot's own."""
        for column, place in enumerate(self.places(slot)):
            if column >= first:
                self.columns[place] = (slot, column)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 20), st.integers(0, SLOTS - 1)), max_size=30))
def test_what_stands_in_an_extent_stays_whatever_the_others_do(actions):
    """A size of 0 releases. Every canvas that fits into the free columns is given, wherever the gaps are, and shares half of
    what another slot has. Columns that several share stand in the arena once, as long as one of them is left."""
    arena, texts = Arena(), {}
    extents = arena.extents
    for slot, size, source in actions:
        extents.release(slot)
        texts.pop(slot, None)
        shared = min(len(texts.get(source, ())), size) // 2
        if shared:
            extents.share(source, slot, shared)
        free, begins_with = extents.free, extents.shared_of(slot)
        assert begins_with <= shared
        if size and extents.acquire(slot, size):
            assert size - begins_with <= free == extents.free + size - begins_with
            arena.write(slot, begins_with)
            own = [(slot, column) for column in range(begins_with, size)]
            texts[slot] = texts[source][:begins_with] + own if begins_with else own
        else:
            assert not size or size - begins_with > free
            extents.release(slot)
        places = {slot: arena.places(slot) for slot in texts}
        for other, text in texts.items():
            assert arena.text_of(other) == text
            assert extents.size_of(other) == len(text) and min(places[other]) > 0 and max(places[other]) < COLUMNS
            own = places[other][extents.shared_of(other) :]
            assert [extents.place_of(other, column) for column in range(len(text))] == places[other]
            assert not any(set(own) & set(places[each]) for each in texts if each != other)
        assert extents.held_by(list(range(SLOTS))) == COLUMNS - 1 - extents.free
        for without in range(SLOTS):
            others = [other for other in range(SLOTS) if other != without]
            assert extents.held_by(others) <= COLUMNS - 1 - extents.free - len(places.get(without, ()))
    for slot in range(SLOTS):
        if slot not in texts:
            assert arena.places(slot) == [0]  # the arena's scratch column
        extents.release(slot)
    assert extents.free == COLUMNS - 1


def test_an_extent_can_shrink_where_it_is():
    arena = Arena()
    arena.extents.acquire(0, 20)
    arena.write(0)
    arena.extents.shrink(0, 5)
    assert arena.text_of(0) == [(0, column) for column in range(5)] and arena.extents.free == COLUMNS - 1 - 5
    assert arena.extents.acquire(1, 20) and arena.moves == 0
