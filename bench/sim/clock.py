"""Simulated time: what is to happen, in order.

Invariant: time never runs backwards; ties go in order of asking.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """``now`` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Calls ``action`` at ``time``, or now if that is past."""
        heapq.heappush(self._events, (max(time, self.now), next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
