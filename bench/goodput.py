"""The highest rate that keeps its promises, found in few windows.

Owns the order in which rates are tried and the verdict on one window; knows no server. Invariant: a rate is tried
at most once in a search, and the answer passed while the next higher rate that was tried failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bench.metrics import Slo
from bench.record import Record


def highest(rates: Sequence[float], passes: Callable[[float], bool], first: int) -> int | None:
    """Index of the highest of ascending ``rates`` that passes; None if none does.

    Goes from ``first`` in strides that double until the answer lies between two rates, then halves what is left.
    """
    low, high, at, stride = -1, len(rates), first, 1
    while high - low > 1:
        if passes(rates[at]):
            low = at
        else:
            high = at
        if low >= 0 and high < len(rates):
            at = (low + high) // 2
        else:
            at = min(low + stride, high - 1) if low >= 0 else max(high - stride, 0)
            stride *= 2
    return low if low >= 0 else None


class Verdict:
    """Counts the requests of one window that miss their limits; ``attainment`` of all is what must keep them."""

    def __init__(self, slo: Slo, requests: int, attainment: float) -> None:
        self.requests = requests
        self.missed = 0
        self._slo = slo
        self._allowed = requests - math.ceil(requests * attainment - 1e-9)

    def lost(self, record: Record) -> bool:
        """Counts one request; whether by now too many have missed for the window to pass."""
        self.missed += not self._slo.kept(record)
        return self.missed > self._allowed

    @property
    def passed(self) -> bool:
        return self.missed <= self._allowed

    @property
    def attainment(self) -> float:
        """Part of all requests that kept the limits; of a window that was ended early, the most it could be."""
        return 1 - self.missed / self.requests
