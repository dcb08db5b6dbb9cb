"""The search for the highest rate, with rates that pass by rule."""

from __future__ import annotations

import pytest

from bench.goodput import Verdict, highest
from bench.metrics import Slo
from bench.record import Record
from tests.bench.conftest import MakeRecord

RATES = [0.25 * 2 ** (step / 4) for step in range(17)]


@pytest.mark.parametrize("best", [None, *range(len(RATES))])
@pytest.mark.parametrize("first", [0, 8, 16])
def test_the_highest_rate_that_passes_is_found_and_none_is_tried_twice(best: int | None, first: int) -> None:
    tried = []

    def passes(rate: float) -> bool:
        tried.append(rate)
        return best is not None and rate <= RATES[best]

    assert highest(RATES, passes, first) == best
    assert len(tried) == len(set(tried)) <= 8


def test_a_good_guess_costs_two_windows() -> None:
    tried = []

    def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= RATES[8]

    assert highest(RATES, passes, 8) == 8
    assert tried == [RATES[8], RATES[9]]


def test_a_window_is_lost_once_too_many_have_missed(make_record: MakeRecord) -> None:
    late: Record = make_record((13.0, 1), (13.1, 1))
    verdict = Verdict(Slo({"ttft": 2500.0}), requests=20, attainment=0.9)
    assert [verdict.lost(late) for _ in range(3)] == [False, False, True]
    assert not verdict.passed
    assert verdict.attainment == pytest.approx(0.85)


def test_a_window_passes_with_just_enough(make_record: MakeRecord) -> None:
    verdict = Verdict(Slo({"ttft": 2500.0}), requests=10, attainment=0.9)
    outcomes = [verdict.lost(make_record((10.1, 1))) for _ in range(9)] + [verdict.lost(make_record((13.0, 1)))]
    assert not any(outcomes)
    assert verdict.passed
