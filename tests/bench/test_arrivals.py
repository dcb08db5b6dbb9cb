"""Arrival processes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bench.arrivals import Arrivals, replayed


def gaps_of(burstiness: float) -> np.ndarray:
    offsets = Arrivals(10.0, burstiness).offsets(20_000, np.random.default_rng(7))
    return np.diff([0.0, *offsets])


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_of_the_rate_and_the_variation_of_the_burstiness(
    burstiness: float, variation: float
) -> None:
    gaps = gaps_of(burstiness)
    assert gaps.mean() == pytest.approx(0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_gaps_of_a_poisson_process_are_exponential() -> None:
    gaps = gaps_of(1.0)
    for seconds in (0.05, 0.1, 0.3):
        assert (gaps > seconds).mean() == pytest.approx(np.exp(-seconds * 10), abs=0.02)


def test_a_run_lasts_as_long_as_its_rate_says() -> None:
    assert Arrivals(2.0).offsets(30, np.random.default_rng())[-1] == pytest.approx(15.0)


def test_offsets_never_decrease() -> None:
    offsets = Arrivals(5.0, 0.1).offsets(1000, np.random.default_rng())
    assert all(before <= after for before, after in pairwise(offsets))


def test_one_seed_gives_one_process() -> None:
    first, second = (Arrivals(3.0).offsets(9, np.random.default_rng(1)) for _ in range(2))
    assert first == second


def test_without_a_rate_all_come_at_once() -> None:
    assert Arrivals().offsets(3, np.random.default_rng()) == [0.0, 0.0, 0.0]


def test_recorded_times_are_replayed_from_zero_and_faster() -> None:
    assert replayed([4.0, 10.0, 6.0], 2.0) == [0.0, 1.0, 3.0]
