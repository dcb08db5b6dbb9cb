from __future__ import annotations

from typing import cast

import pytest

from bench import overload
from bench.overload import Load, Outcome, find_peak

LOAD = cast(Load, None)  # nothing is asked


@pytest.mark.parametrize("capacity", [3.0, 5.0])
async def test_the_peak_is_the_best_of_two_rates_asked_as_long_as_the_overload(
    monkeypatch: pytest.MonkeyPatch, capacity: float
) -> None:
    asked: list[tuple[float, float]] = []

    async def at_rate(_load: Load, rate: float, seconds: float) -> Outcome:
        """A server that loses half of what is too much, and answers for two seconds after the end of the load."""
        asked.append((rate, seconds))
        able = capacity * (seconds + 2) / seconds
        return Outcome(rate, min(rate, able - (rate - able) / 2), (), ())

    monkeypatch.setattr(overload, "at_rate", at_rate)
    said: list[str] = []
    peak = await find_peak(LOAD, 1.0, 10.0, 60.0, said.append)
    searched = [rate for rate, seconds in asked if seconds == 10.0]
    assert searched == pytest.approx([1.3**i for i in range(len(searched))])
    best = searched[-2]
    assert [rate for rate, seconds in asked if seconds == 60.0] == pytest.approx([best / 1.3, best])
    assert capacity / 1.3 < peak.goodput <= capacity * 62 / 60
    assert len(said) == len(asked)
