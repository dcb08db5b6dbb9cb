"""Servers in turns, round by round. Owns who is measured when; knows no load and no figures.

Within a round the servers follow one another; one that ``stays`` is started once and idles while others are
measured. A server with fewer rounds takes part in the last ones. What is on disk is not measured again, so a
comparison that was cut off goes on where it was.
Invariant: a server that fails ends only its own round, and leaves its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bench.peers import Peer
from bench.results import ERROR, Results
from bench.workloads import ONCE
from splitserve.errors import ConfigError

ServerT = TypeVar("ServerT")
Start = Callable[[Peer], AbstractContextManager[ServerT]]
Measure = Callable[[Peer, ServerT, str], dict[str, Any]]  # the workload by its name; both raise ConfigError
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Up(Generic[ServerT]):
    """A server that runs until ``end`` is closed."""

    server: ServerT
    end: ExitStack


@dataclass(frozen=True, slots=True)
class Rounds:
    """A comparison: who, what, how often, and where results are kept."""

    peers: Sequence[Peer]
    workloads: Sequence[str]  # in the order of measuring
    rounds: int
    results: Results

    def missing(self, peer: Peer, number: int) -> list[str]:
        """Workloads that round ``number`` (from 1) still lacks of this server."""
        if number <= self.rounds - (peer.rounds or self.rounds):
            return []
        return [
            workload
            for workload in self.workloads
            if peer.takes(workload)
            and (workload not in ONCE or number == self.rounds)
            and not self._known(peer, number, workload)
        ]

    def play(self, start: Start[ServerT], measure: Measure[ServerT], after: Callable[[], None], say: Say) -> None:
        """Measures what is missing; ``after`` is called after each server's turn."""
        standing: dict[str, _Up[ServerT]] = {}
        try:
            for number in range(1, self.rounds + 1):
                for peer in self.peers:
                    if missing := self.missing(peer, number):
                        say(f"== round {number} of {self.rounds}: {peer.name}")
                        self._turn(peer, number, missing, standing, start, measure, say)
                        after()
        finally:
            for up in standing.values():
                up.end.close()

    def _turn(
        self,
        peer: Peer,
        number: int,
        missing: Sequence[str],
        standing: dict[str, _Up[ServerT]],
        start: Start[ServerT],
        measure: Measure[ServerT],
        say: Say,
    ) -> None:
        self.results.drop(peer.name, number, ERROR)
        with ExitStack() as turn:
            try:
                up = standing.pop(peer.name, None)
                server = turn.enter_context(start(peer)) if up is None else up.server
                if up is not None:
                    turn.push(up.end)
                for workload in missing:
                    self.results.put(peer.name, number, workload, measure(peer, server, workload))
            except ConfigError as error:
                say(f"  {error.message}")
                self.results.put(peer.name, number, ERROR, {"message": error.message})
                return
            if peer.stays and any(self.missing(peer, later) for later in range(number + 1, self.rounds + 1)):
                standing[peer.name] = _Up(server, turn.pop_all())

    def _known(self, peer: Peer, number: int, workload: str) -> bool:
        # a server that stays is started once: one figure for all rounds
        where = range(1, number + 1) if workload == "start" and peer.stays else (number,)
        return any(self.results.has(peer.name, earlier, workload) for earlier in where)
