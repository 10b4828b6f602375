"""The windows of a pass as a rectangle and as a list: the same tokens, each seeing the same."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf.generation.window import RUN_LENGTH, Frame, make_list, make_window

SCRATCH, SLOTS = 300, 8


@st.composite
def frames(draw) -> Frame:
    """Of a block being decoded, alone, with what stands before it, or of a piece of a prompt."""
    start = draw(st.integers(0, 40))
    end = start + draw(st.sampled_from([1, 2, 4, 5, 8, 64, 65, 200]))
    length, grid = draw(st.integers(end, 280)), draw(st.sampled_from([0, 4]))
    first = draw(st.integers(start + 1, end)) if draw(st.booleans()) else 0
    last = min(end, first + 5) if first else 0
    return Frame(start, end, first, last, length, length, start, grid)


@given(st.lists(frames(), min_size=1, max_size=SLOTS), st.integers(0, 1), st.sampled_from([0, 1024]))
def test_a_list_feeds_what_a_rectangle_feeds_without_its_padding(every, shift, padded_up_to):
    slots = list(range(len(every)))[::-1]
    rectangle = make_window(every, slots, SLOTS, SCRATCH, shift)
    flat = make_list(every, slots, SLOTS, SCRATCH, shift, padded_up_to)
    for name in ("slots", "final", "block", "shown"):
        assert torch.equal(getattr(flat, name), getattr(rectangle, name))
    begin, seen = 0, []
    for row, frame in enumerate(every):
        width = frame.end - frame.start
        own = slice(begin, begin + width)
        assert flat.owners[own].eq(slots[row]).all()
        assert torch.equal(flat.columns[own], rectangle.columns[row, :width])
        assert torch.equal(flat.lengths[own], rectangle.lengths[row, :width])
        if frame.last > frame.first:
            kept = frame.last - frame.first
            assert torch.equal(flat.keep[row, :kept] - begin, rectangle.keep[row, :kept])
        begin += width
    assert flat.columns[begin:].eq(SCRATCH).all() and flat.lengths[begin:].eq(0).all()
    for slot, first, number in flat.runs.tolist():
        assert number <= flat.longest <= RUN_LENGTH
        assert flat.owners[first : first + number].eq(slot).all()
        seen += range(first, first + number)
    assert sorted(seen) == list(range(len(flat.columns)))


@given(st.lists(st.sampled_from([4, 8]), min_size=2, max_size=SLOTS))
def test_padded_lists_have_few_shapes(widths):
    """Their runs depend on the number of rows and of tokens alone, so that a graph serves all such steps."""
    every = [Frame(0, width, width - 4, width, 20, 20, 0, 4) for width in widths]
    flat = make_list(every, list(range(len(every))), SLOTS, SCRATCH, 0, 1024)
    if len(set(widths)) == 1:
        assert len(flat.columns) == sum(widths) and len(flat.runs) == len(widths)
    else:
        assert len(flat.columns) in (16, 32, 64) and len(flat.runs) == len(widths) + len(flat.columns) // 8


def test_copies_of_a_list_stand_behind_it():
    every = [Frame(2, 6, 2, 6, 12, 12, 0, 0), Frame(0, 9, 4, 8, 12, 12, 0, 0)]
    flat = make_list(every, [1, 0], 2, SCRATCH, 0)
    twice = flat.repeated(2, 2)
    assert twice.owners.tolist() == flat.owners.tolist() + [owner + 2 for owner in flat.owners.tolist()]
    assert torch.equal(twice.columns[twice.keep[2:]], flat.columns[flat.keep])
    assert twice.runs.tolist()[2:] == [[slot + 2, first + 13, number] for slot, first, number in flat.runs.tolist()]
