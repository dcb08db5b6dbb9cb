from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import ConfigError
from splitserve.local import divide_cores
from splitserve.shared_cores import COLUMNS, SharedCores, create_table, spare_cores


@given(st.integers(1, 20), st.sets(st.integers(0, 255), min_size=1, max_size=64).map(sorted))
def test_spare_cores_are_those_of_the_others_where_each_has_its_own(count: int, available: list[int]) -> None:
    owned = divide_cores(count, available)
    spare = spare_cores(owned)
    if count > len(available):
        assert not any(spare)
        return
    assert all(set(mine) | set(others) == set(available) for mine, others in zip(owned, spare, strict=True))
    assert all(not set(mine) & set(others) for mine, others in zip(owned, spare, strict=True))


def test_workers_without_cores_of_their_own_lend_none() -> None:
    assert spare_cores([(0,), ()]) == [(), ()]


def test_a_worker_marks_its_own_cores_for_everyone(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    create_table(path, [0, 1, 2, 5])
    mine, other = SharedCores(str(path), [1, 5]), SharedCores(str(path), [0, 2])
    mine.working(True)
    seen = memoryview(other.memory).cast("i")
    assert [core for core in range(6) if seen[core * COLUMNS]] == [1, 5]
    mine.working(False)
    assert not any(seen)


def test_a_worker_that_was_killed_at_work_is_idle_when_it_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    create_table(path, [0])
    SharedCores(str(path), [0]).working(True)
    again = SharedCores(str(path), [0])
    assert not any(memoryview(again.memory).cast("i"))


def test_a_table_that_is_not_there_or_too_short_is_a_wrong_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be mapped"):
        SharedCores(str(tmp_path / "none"), [0])
    create_table(tmp_path / "cores", [0])
    with pytest.raises(ConfigError, match="ends before core 3"):
        SharedCores(str(tmp_path / "cores"), [3])
