"""Runs of blocks that are contiguous in both pools."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.frames import MAX_JOINED
from kvtransfer.runs import cut, joined

ids = st.lists(st.integers(0, 30), max_size=40)


def test_contiguous_blocks_are_one_run() -> None:
    assert cut(range(7, 15), 0, joined(range(3, 11), 999), longest=100) == (8,)


def test_a_gap_on_either_side_cuts() -> None:
    assert cut([0, 1, 2, 9, 10, 11], 0, joined([4, 5, 6, 7, 0, 1], 999), longest=100) == (3, 1, 2)


def test_a_run_is_not_longer_than_allowed() -> None:
    assert cut(range(7), 0, joined(range(7), 999), longest=3) == (3, 3, 1)


def test_a_run_is_not_longer_than_the_puller_takes() -> None:
    assert cut(range(8), 0, joined(range(8), 3), longest=100) == (3, 3, 2)
    assert cut(range(8), 0, joined([0, 1, 4, 5, 6, 7, 8, 2], 3), longest=100) == (2, 3, 2, 1)


def test_a_puller_that_says_nothing_gets_single_blocks() -> None:
    assert cut(range(4), 0, b"", longest=9) == (1, 1, 1, 1)


def test_blocks_beyond_the_largest_frame_are_single() -> None:
    bits = joined(range(MAX_JOINED * 8 + 10), 999)
    assert len(bits) == MAX_JOINED
    assert cut(range(4), MAX_JOINED * 8 - 2, bits, longest=9) == (2, 1, 1)


@given(ids, ids, st.integers(0, 8), st.integers(1, 9), st.integers(1, 9))
def test_every_run_is_contiguous_on_both_sides(
    here: list[int], there: list[int], first: int, longest: int, taken: int
) -> None:
    source = here[: max(0, len(there) - first)]
    runs = cut(source, first, joined(there, taken), longest)
    assert sum(runs) == len(source)
    place = 0
    for run in runs:
        assert 1 <= run <= min(longest, taken)
        assert source[place : place + run] == list(range(source[place], source[place] + run))
        target = there[first + place : first + place + run]
        assert target == list(range(target[0], target[0] + run))
        place += run
