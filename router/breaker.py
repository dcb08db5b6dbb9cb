"""Circuit breakers: which workers a router leaves alone because requests failed there.

One breaker for each incarnation that has failed lately. A worker that is gone (`Trouble.GONE`) or says that it
cannot serve (`Trouble.DOWN`) is ejected at once, one that fails requests (`Trouble.FAILED`) after five in a row.
When its time is over one request may try it: success ends the ejection, failure renews it, for twice as long
unless the worker is gone. Knows no network.

Invariant: what a worker answers ejects at most half of a role's workers, so never all; a worker that cannot be
reached is ejected whatever the others are, because there is nothing to be gained there.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from splitserve.cluster import Role, WorkerInfo, WorkerState

log = logging.getLogger(__name__)

Incarnation = tuple[str, int]  # worker id, epoch

FAILURES = 5  # in a row
LONGEST_SECONDS = 30.0
QUIET_SECONDS = 10.0  # without a failure: what comes then is new trouble


class Trouble(enum.Enum):
    GONE = enum.auto()  # no connection, or it has fallen silent
    DOWN = enum.auto()  # it says that it cannot serve
    FAILED = enum.auto()  # it could not serve one request


@dataclass(slots=True)
class _Breaker:
    failures: int = 0  # in a row
    trips: int = 0  # in a row
    tripped_at: float | None = None  # None: not ejected
    open_until: float = 0.0
    tried: bool = False  # by one request, since `open_until` has passed
    gone: bool = False
    trouble_since: float = 0.0
    trouble_until: float = float("-inf")


class Breakers:
    """Times are of one clock, in seconds. ``eject_seconds``: how long a worker is left alone at first."""

    def __init__(self, eject_seconds: float = 3.0) -> None:
        self._eject_seconds = eject_seconds
        self._breakers: dict[Incarnation, _Breaker] = {}

    def failed(self, worker: WorkerInfo, trouble: Trouble, now: float, sent: float) -> bool:
        """A request that was sent there at ``sent`` failed. True if no worker that is up bears more: this one
        is gone with all it had, or went down when nobody could have known."""
        breaker = self._breakers.setdefault((worker.id, worker.epoch), _Breaker())
        if now > breaker.trouble_until:
            breaker.trouble_since = now
        breaker.trouble_until = now + QUIET_SECONDS
        breaker.failures += 1
        if trouble is not Trouble.FAILED or breaker.failures >= FAILURES or breaker.tripped_at is not None:
            self._trip(breaker, worker, trouble, now)
        return trouble is Trouble.GONE or (trouble is Trouble.DOWN and sent <= breaker.trouble_since)

    def succeeded(self, worker: WorkerInfo, sent: float) -> None:
        """A request that was sent there at ``sent`` did well."""
        breaker = self._breakers.get((worker.id, worker.epoch))
        if breaker is None or (breaker.tripped_at is not None and sent <= breaker.tripped_at):
            return
        if breaker.tripped_at is not None:
            log.info("worker %s answers again", worker.id)
        breaker.failures = breaker.trips = 0
        breaker.tripped_at, breaker.tried, breaker.gone = None, False, False

    def claim(self, worker: WorkerInfo, now: float) -> None:
        """A request will be sent there. If it is one that tries an ejected worker, others stay away meanwhile."""
        breaker = self._breakers.get((worker.id, worker.epoch))
        if breaker is not None and breaker.tripped_at is not None and breaker.open_until <= now:
            breaker.open_until = now + self._eject_seconds
            breaker.tried = True

    def usable(self, states: Sequence[WorkerState], now: float) -> Sequence[WorkerState]:
        """Those of one model's workers that requests may be sent to."""
        if not self._breakers:
            return states
        ejected = self._ejected(states, Role.PREFILL, now) | self._ejected(states, Role.DECODE, now)
        return [s for s in states if (s.info.id, s.info.epoch) not in ejected]

    def keep(self, workers: Collection[Incarnation], now: float) -> None:
        """Forgets all others, and trouble that is over."""
        self._breakers = {
            key: breaker
            for key, breaker in self._breakers.items()
            if key in workers and (breaker.tripped_at is not None or breaker.trouble_until > now)
        }

    def _trip(self, breaker: _Breaker, worker: WorkerInfo, trouble: Trouble, now: float) -> None:
        breaker.gone = trouble is Trouble.GONE
        if breaker.tripped_at is not None and now < breaker.open_until and not breaker.tried:
            return  # sent before the ejection: it says nothing new
        if breaker.tripped_at is None:
            breaker.tripped_at = now
        seconds = min(LONGEST_SECONDS, self._eject_seconds * 2**breaker.trips)
        breaker.trips = 0 if breaker.gone else min(breaker.trips + 1, 10)
        breaker.open_until, breaker.tried = now + seconds, False
        log.warning("worker %s failed (%s): nothing new for %.1f s", worker.id, trouble.name.lower(), seconds)

    def _ejected(self, states: Sequence[WorkerState], role: Role, now: float) -> set[Incarnation]:
        members = [(s.info.id, s.info.epoch) for s in states if s.info.role is role]
        tripped = [(key, b) for key in members if (b := self._breakers.get(key)) and b.tripped_at is not None]
        gone = {key for key, b in tripped if b.gone}
        suspects = sorted((b.tripped_at or 0.0, key) for key, b in tripped if not b.gone)
        allowed = max(0, len(members) // 2 - len(gone))
        chosen = gone | {key for _, key in suspects[:allowed]}
        ejected = {key for key in chosen if self._breakers[key].open_until > now}
        if len(ejected) < len(members):
            return ejected
        # Where nobody else is left, all may go where one request is trying: without it they fail for sure.
        return {key for key in ejected if not self._breakers[key].tried}
