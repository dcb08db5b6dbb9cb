from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitserve.local import divide_cores

CORES = st.sets(st.integers(0, 255), min_size=1, max_size=64).map(sorted)


@given(st.integers(1, 80), CORES)
def test_every_worker_has_cores_that_may_be_used(num_workers: int, available: list[int]) -> None:
    divided = divide_cores(num_workers, available)
    assert len(divided) == num_workers
    assert all(cores and set(cores) <= set(available) for cores in divided)


@given(st.integers(1, 64), CORES)
def test_cores_are_shared_only_when_there_are_too_few(num_workers: int, available: list[int]) -> None:
    used = [core for cores in divide_cores(num_workers, available) for core in cores]
    if num_workers <= len(available):
        assert sorted(used) == available
    else:
        assert max(map(used.count, available)) - min(map(used.count, available)) <= 1


@given(st.integers(1, 64), CORES)
def test_shares_differ_by_one_core_at_most(num_workers: int, available: list[int]) -> None:
    sizes = [len(cores) for cores in divide_cores(num_workers, available)]
    assert max(sizes) - min(sizes) <= 1
