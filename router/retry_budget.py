"""How much load retries may add: a share of the requests that a router sent to workers lately.

When everything fails, retries would multiply the load of workers that are in trouble already. Knows no worker and
no request. Invariant: over any window, retries that had to ask number at most the share of its requests, or the
floor where that is more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class _Second:
    number: int
    requests: int = 0
    retries: int = 0


class RetryBudget:
    """Times are of one clock, in seconds; counts are kept by the whole second."""

    def __init__(self, share: float = 0.2, floor: int = 3, window: int = 10) -> None:
        self._share = share
        self._floor = floor
        self._window = window
        self._seconds: deque[_Second] = deque()

    def note_request(self, now: float) -> None:
        """A request is sent to workers for the first time."""
        self._at(now).requests += 1

    def note_move(self, now: float) -> None:
        """A request goes on elsewhere without asking; what asks later finds less."""
        self._at(now).retries += 1

    def take(self, now: float) -> bool:
        """Whether a request may be tried again; counted if so."""
        current = self._at(now)
        requests = sum(second.requests for second in self._seconds)
        if sum(second.retries for second in self._seconds) >= max(self._floor, int(self._share * requests)):
            return False
        current.retries += 1
        return True

    def _at(self, now: float) -> _Second:
        """The current second; those that have left the window are dropped."""
        number = int(now)
        while self._seconds and self._seconds[0].number <= number - self._window:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].number != number:
            self._seconds.append(_Second(number))
        return self._seconds[-1]
