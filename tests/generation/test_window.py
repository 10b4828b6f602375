"""The windows of a pass as a rectangle and as a list: the same tokens, each seeing the same."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_hf.generation.window import MOST_BEGINNINGS, RUN_LENGTH, Frame, Pays, make_list, make_window, steps_after

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


# --- beginnings that rows read together


@given(st.lists(st.tuples(frames(), st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=24))
def test_each_token_is_in_one_piece_and_reads_the_beginning_of_its_row(every):
    every = sorted(((frame, key, shared if key else 0) for frame, key, shared in every), key=lambda row: row[1])
    beginnings, slots = [row[1:] for row in every], list(range(len(every)))
    list_of = lambda pays: make_list(
        [frame for frame, *_ in every], slots, 24, SCRATCH, 0, 1024, beginnings=beginnings, pays=pays
    )
    flat, apart = list_of(Pays(16, 1)), list_of(None)
    assert not len(apart.pieces) and not len(apart.beginnings) and not len(apart.skipped)
    if not len(flat.pieces):
        return
    assert len(flat.pieces) == len(flat.columns) // RUN_LENGTH + MOST_BEGINNINGS  # whatever rows read
    assert len(flat.beginnings) == len(flat.columns) and len(flat.skipped) == len(flat.runs)
    seen, together = [], set()
    for slot, first, number in flat.pieces.tolist():
        assert number <= RUN_LENGTH
        seen += range(first, first + number)
        for token in range(first, first + number):
            row = flat.owners[token]
            if count := int(flat.beginnings[token]):
                together.add(every[slot][1])
                assert every[slot][1] == every[row][1]
                assert count == min(every[row][2], every[row][0].start) <= flat.lengths[token]
    assert sorted(seen) == list(range(len(flat.columns)))
    for (_, first, number), skipped in zip(flat.runs.tolist(), flat.skipped.tolist()):
        assert not number or flat.beginnings[first : first + number].eq(skipped).all()
    for row, (frame, key, shared) in enumerate(every):
        used = flat.beginnings[flat.owners.eq(row) & flat.lengths.gt(0)]
        assert key not in together or used.eq(min(shared, frame.start)).all()


def test_rows_read_a_beginning_together_where_that_reads_fewer_columns():
    """64 rows in blocks of 4, of which a tile has room for four: a quarter is read. Blocks of 16 fill tiles by themselves."""
    kinds = lambda rows, width, columns: [
        bool(len(window.pieces))
        for least in (columns, columns + 1)
        for window in [
            make_list(
                [Frame(2000, 2000 + width, 0, 0, 2100, 0, 0, 0)] * rows, list(range(rows)), 64, 3000, 0, 4096,
                beginnings=[(64, 2000)] * rows, pays=Pays(16, least),
            )
        ]
    ]  # fmt: skip
    assert kinds(64, 4, (64 - 16) * 2000) == [True, False]
    assert kinds(3, 4, 2 * 2000) == [True, False]
    assert kinds(64, 16, 0) == kinds(1, 4, 0) == [False, False]


def test_the_longest_sums_of_beginnings_are_read_together_where_there_are_many():
    keys = [key for key in range(1, 12) for _ in range(3)]
    rows = [Frame(100 + key, 104 + key, 0, 0, 200, 0, 0, 0) for key in keys]
    every = list(range(len(rows)))
    flat = make_list(rows, every, 40, SCRATCH, 0, 1024, None, [(key, 50 + key) for key in keys], Pays(16, 1))
    read = {keys[slot] for slot, _, number in flat.pieces.tolist() if number}
    assert read == set(range(4, 12)) and flat.beginnings[: 3 * 3 * 4].eq(0).all()


def test_the_steps_after_a_pass_may_read_together_as_it_does():
    rows = [Frame(100, 300, 296, 300, 400, 300, 0, 4) for _ in range(4)]
    flat = make_list(rows, [0, 1, 2, 3], 4, 500, 0, 1024, None, [(4, 100)] * 4, Pays(1000, 1))
    for after in steps_after(flat):
        again = make_list(
            [Frame(296, 296 + len(after.columns) // 4, 296, 300, 400, 300, 0, 4)] * 4, [0, 1, 2, 3], 4, 500, 0, 1024,
            None, [(4, 100)] * 4, Pays(1000, 1),
        )  # fmt: skip
        for name in ("columns", "runs", "pieces", "beginnings", "skipped"):
            assert getattr(after, name).shape == getattr(again, name).shape
