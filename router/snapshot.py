"""What a router believes of its cluster: the latest worker states and its own requests in flight.

Owns one task that reads the directory; knows no policy. Invariant: a worker leaves the view only because the
directory, being healthy, has dropped it or because its lease has ended, never because Redis is away, is just back,
or has lost its memory; a model's pool leaves out those that its breakers have ejected.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from router.breaker import Breakers, Incarnation
from router.estimates import estimated
from splitserve.cluster import Role, WorkerLoad, WorkerState
from splitserve.directory import Directory
from splitserve.errors import Unavailable

logger = logging.getLogger(__name__)

_SETTLED_SECONDS = 10.0  # after a worker has come or gone
_MORE_OFTEN = 5  # until then: others follow


@dataclass(frozen=True, slots=True)
class ModelPool:
    """The workers of one model that may work together: all of one fingerprint."""

    model: str
    fingerprint: str
    states: tuple[WorkerState, ...]

    def count(self, role: Role) -> int:
        """Workers of ``role`` that take new requests."""
        return sum(s.info.role is role and not s.load.draining for s in self.states)


@dataclass(frozen=True, slots=True)
class _Sighting:
    state: WorkerState
    beat_at: float  # loop time of the heartbeat that the state was read from


@dataclass(slots=True, eq=False)
class _InFlight:
    tokens: int  # to compute there
    blocks: int  # to be held there
    begun_at: float  # loop time


class ClusterView:
    """A router's view of the workers in ``directory``, refreshed every ``refresh_seconds``, five times as often
    while workers are awaited: while there is none, and for a while after one has come or gone.

    ``breakers``: whom to leave alone, in loop time; those who send requests tell them how it went.
    """

    def __init__(
        self, directory: Directory, refresh_seconds: float = 0.5, breakers: Breakers | None = None
    ) -> None:
        self._directory = directory
        self._refresh_seconds = refresh_seconds
        self.breakers = breakers or Breakers()
        self._seen: dict[str, _Sighting] = {}
        self._in_flight: defaultdict[Incarnation, set[_InFlight]] = defaultdict(set)
        self._incarnations: dict[tuple[str, str], list[Incarnation]] = {}  # model, fingerprint -> those seen
        self._chosen: dict[str, str] = {}  # model -> fingerprint of the group in use
        self._mismatches: set[tuple[str, frozenset[str]]] = set()
        self._refreshed_at: float | None = None
        self._failing = False
        self._back_at = -math.inf  # loop time at which Redis was last found again
        self._changed_at = -math.inf  # loop time
        self.changed = asyncio.Event()  # set when workers joined or left; whoever waits clears it
        self._refreshing: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def stale(self) -> bool:
        """Whether the last look at the directory failed: the view is what was last known."""
        return self._failing or self._refreshed_at is None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Looks once and goes on looking. Does not raise when Redis is away."""
        assert self._task is None, "already started"
        await self.refresh()
        self._task = asyncio.create_task(self._run(), name="cluster view")

    async def close(self) -> None:
        tasks = [task for task in (self._task, self._refreshing) if task is not None]
        self._task = self._refreshing = None
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def refresh(self) -> bool:
        """Looks at the directory now; callers at the same time share one look. False: it failed."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._look(), name="cluster view refresh")
        await asyncio.shield(self._refreshing)
        return not self._failing

    def models(self) -> dict[str, ModelPool]:
        """The pools of all models that have a worker."""
        models = dict.fromkeys(sighting.state.info.model for sighting in self._seen.values())
        return {model: pool for model in models if (pool := self.pool(model)) is not None}

    def pool(self, model: str) -> ModelPool | None:
        """The workers that serve ``model``, with this router's own requests counted in."""
        now = asyncio.get_running_loop().time()
        members: defaultdict[str, list[WorkerState]] = defaultdict(list)
        for sighting in self._seen.values():
            if sighting.state.info.model == model:
                members[sighting.state.info.fingerprint].append(self._with_in_flight(sighting, now))
        groups = {fp: usable for fp, states in members.items() if (usable := self.breakers.usable(states, now))}
        if not groups:
            return None
        chosen = self._choose(model, groups)
        return ModelPool(model, chosen, tuple(groups[chosen]))

    def incarnations(self, model: str, fingerprint: str) -> Sequence[Incarnation]:
        """All that serve ``model`` with this fingerprint, also those that are left alone for a while."""
        return self._incarnations.get((model, fingerprint), ())

    def states(self) -> list[WorkerState]:
        """All workers in the view, whatever their model, with this router's own requests counted in."""
        now = asyncio.get_running_loop().time()
        return [self._with_in_flight(sighting, now) for sighting in self._seen.values()]

    def addresses(self) -> set[str]:
        """gRPC addresses of all workers, also of those that are left alone for a while."""
        return {sighting.state.info.grpc_address for sighting in self._seen.values()}

    @contextmanager
    def begin(self, worker: WorkerState, tokens: int = 0, blocks: int = 0) -> Iterator[None]:
        """Counts a request as in flight on a worker for the length of the block.

        ``tokens``: to compute there; ``blocks``: to be held there. Until the worker's own numbers can tell of
        it, the view adds it to them, so that requests that come between two heartbeats spread.
        """
        entry = _InFlight(tokens, blocks, asyncio.get_running_loop().time())
        key = (worker.info.id, worker.info.epoch)
        entries = self._in_flight[key]
        entries.add(entry)
        try:
            yield
        finally:
            entries.discard(entry)
            if not entries:
                self._in_flight.pop(key, None)

    async def _run(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._pause())
                await self.refresh()
        except Exception:
            logger.critical("the view of the cluster failed and stands still", exc_info=True)
            raise

    def _pause(self) -> float:
        """Seconds until the next look."""
        since_change = asyncio.get_running_loop().time() - self._changed_at
        settled = bool(self._seen) and since_change > _SETTLED_SECONDS
        return self._refresh_seconds if settled else self._refresh_seconds / _MORE_OFTEN

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        try:
            found = {
                state.info.id: _Sighting(state, asked_at - state.age_seconds)
                for state in estimated(await self._directory.workers())
            }
            gone = [id for id in self._seen if id not in found]
            known = await self._directory.epochs(gone)
        except Unavailable as error:
            if not self._failing:
                logger.warning("the directory is away (%s): going on with what was known", error.message)
            self._failing = True
            return
        if self._failing:
            self._back_at = loop.time()
            logger.info("the directory is back")
        for id in gone:
            # No lease was renewed while Redis was away, and an epoch counter that is missing says that Redis has
            # lost its memory: the worker may live, and gets the time of a lease to say so.
            believed_at = self._back_at if id in known else max(self._back_at, self._seen[id].beat_at)
            if loop.time() - believed_at < self._directory.lease_seconds:
                found[id] = self._seen[id]
        before, self._seen = self._seen, found
        self._incarnations = {}
        for info in (sighting.state.info for sighting in found.values()):
            self._incarnations.setdefault((info.model, info.fingerprint), []).append((info.id, info.epoch))
        self._note_changes(before, found)
        self.breakers.keep({(s.state.info.id, s.state.info.epoch) for s in found.values()}, loop.time())
        self._refreshed_at = loop.time()
        self._failing = False

    def _note_changes(self, seen: dict[str, _Sighting], found: dict[str, _Sighting]) -> None:
        before = {(s.state.info.id, s.state.info.epoch) for s in seen.values()}
        after = {(s.state.info.id, s.state.info.epoch) for s in found.values()}
        for id, epoch in sorted(after - before):
            info = found[id].state.info
            logger.info(
                "worker %s joined (%s for %s at %s)",
                id,
                info.role,
                info.model,
                info.grpc_address,
                extra={"epoch": epoch},
            )
        for id, epoch in sorted(before - after):
            logger.info("worker %s left", id, extra={"epoch": epoch})
        if before != after:
            self._changed_at = asyncio.get_running_loop().time()
            self.changed.set()

    def _with_in_flight(self, sighting: _Sighting, now: float) -> WorkerState:
        state = sighting.state
        entries = self._in_flight.get((state.info.id, state.info.epoch), ())
        silent = now - sighting.beat_at > self._directory.lease_seconds
        if not entries and not silent:
            return state
        if silent:
            # Redis is away, or just back. What the worker said of its load is history; what we have sent there is
            # all that is known.
            load = replace(state.load, num_running=0, num_waiting=0, queued_tokens=0, used_blocks=0)
            return replace(state, load=_add(load, entries))
        unseen = [entry for entry in entries if entry.begun_at >= sighting.beat_at]
        return replace(state, load=_add(state.load, unseen)) if unseen else state

    def _choose(self, model: str, groups: Mapping[str, Sequence[WorkerState]]) -> str:
        """The fingerprint to serve: one with decode workers, the one in use before others, then the largest."""

        def rank(fingerprint: str) -> tuple[bool, bool, int, int, str]:
            states = groups[fingerprint]
            decoders = sum(s.info.role is Role.DECODE and not s.load.draining for s in states)
            return (decoders > 0, self._chosen.get(model) == fingerprint, decoders, len(states), fingerprint)

        chosen = max(groups, key=rank)
        self._chosen[model] = chosen
        if len(groups) > 1:
            self._log_mismatch(model, groups, chosen)
        return chosen

    def _log_mismatch(self, model: str, groups: Mapping[str, Sequence[WorkerState]], chosen: str) -> None:
        key = (model, frozenset(groups))
        if key in self._mismatches:
            return
        self._mismatches.add(key)
        described = "; ".join(
            f"{', '.join(s.info.id for s in states)}: {fingerprint[:12]}"
            f" ({states[0].info.block_tokens} tokens a block, version {states[0].info.version or 'unknown'})"
            for fingerprint, states in sorted(groups.items())
        )
        logger.error(
            "workers of model %s differ in fingerprint (weights, dtype, block size or layout) and are not mixed:"
            " %s; requests go to those with %s",
            model,
            described,
            chosen[:12],
        )


def _add(load: WorkerLoad, entries: Collection[_InFlight]) -> WorkerLoad:
    return replace(
        load,
        num_waiting=load.num_waiting + len(entries),
        queued_tokens=load.queued_tokens + sum(entry.tokens for entry in entries),
        used_blocks=load.used_blocks + sum(entry.blocks for entry in entries),
    )
