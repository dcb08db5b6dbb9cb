"""One simulated run: requests through a rule to modelled workers.

Owns the life of a request and the router's book-keeping. Invariant: every request has exactly one outcome, and at
the end no worker holds anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.sim.cache import Index
from bench.sim.clock import Clock
from bench.sim.model import BLOCK_TOKENS, Hardware, Outcome, Request
from bench.sim.rules import Choice, Rule, Tally, View
from bench.sim.workers import DecodeWorker, Job, PrefillWorker
from splitserve.cluster import WorkerLoad
from splitserve.errors import SplitServeError


class SimulatedCluster:
    """``prefills`` and ``decodes`` workers behind one router. ``heartbeat``: seconds between two."""

    def __init__(
        self, prefills: int, decodes: int, hardware: Hardware, rule: Rule, heartbeat: float = 1.0
    ) -> None:
        self.clock = Clock()
        self.outcomes: list[Outcome] = []
        index = Index()
        self.prefills = [PrefillWorker(i, hardware, self.clock, index) for i in range(prefills)]
        self.decodes = [DecodeWorker(prefills + i, hardware, self.clock, index) for i in range(decodes)]
        self._hardware = hardware
        self._rule = rule
        self._heartbeat = heartbeat
        workers = prefills + decodes
        self._view = View(hardware, prefills, decodes, index, [Tally() for _ in range(workers)], [])
        self.prefill_busy = 0.0  # part of the time up to the last arrival, mean over workers
        self.decode_held = 0.0  # part of the KV, likewise
        self._left = 0
        self._beat()

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """Outcomes in order of their end. ``requests`` are in order of time, at least one."""
        self._left = len(requests)
        for request in requests:
            self.clock.at(request.time, lambda request=request: self._arrive(request))  # type: ignore[misc]
        self.clock.after(self._heartbeat, self._tick)
        self.clock.at(requests[-1].time, self._weigh)
        self.clock.run()
        assert len(self.outcomes) == len(requests), "a request was lost"
        assert not any(tally.requests or tally.blocks or tally.tokens for tally in self._view.tallies)
        assert not any(worker.used_blocks or worker.waiting for worker in self.decodes)
        return self.outcomes

    def _weigh(self) -> None:
        seconds = max(self.clock.now, 1e-9)
        self.prefill_busy = sum(p.busy_so_far for p in self.prefills) / (seconds * len(self.prefills))
        blocks = seconds * len(self.decodes) * self._hardware.pool_blocks
        self.decode_held = sum(d.held_so_far for d in self.decodes) / blocks

    def _tick(self) -> None:
        self._beat()
        if self._left:
            self.clock.after(self._heartbeat, self._tick)

    def _beat(self) -> None:
        """Every worker says how it is."""
        speed = self._hardware.prefill_tokens_per_second
        link = self._hardware.link_bytes_per_second
        sequence = self._hardware.decode_sequence_seconds
        loads = [
            WorkerLoad(
                num_running=p.running,
                num_waiting=p.waiting,
                queued_tokens=p.queued_tokens,
                prefill_tokens_per_second=speed,
                transfer_bytes_per_second=link,
            )
            for p in self.prefills
        ]
        loads += [
            WorkerLoad(
                num_running=d.running,
                num_waiting=d.waiting,
                queued_tokens=d.queued_tokens,
                used_blocks=d.used_blocks,
                prefill_tokens_per_second=speed,
                decode_step_seconds=d.step_seconds,
                decode_sequence_seconds=sequence,
                transfer_bytes_per_second=link,
            )
            for d in self.decodes
        ]
        self._view.measured = loads
        self._view.since = [Tally() for _ in loads]

    def _arrive(self, request: Request) -> None:
        try:
            choice = self._rule.choose(request, self._view)
        except SplitServeError:
            self._finish(Outcome(request, refused=True, ended=self.clock.now))
            return
        _Life(self, request, choice)

    def book(self, number: int, sign: int, tokens: int, blocks: int) -> None:
        """Adds a request to what the router knows of a worker, or takes it away."""
        books = (self._view.tallies, self._view.since) if sign > 0 else (self._view.tallies,)
        for book in books:
            book[number].requests += sign
            book[number].tokens += sign * tokens
            book[number].blocks += sign * blocks

    def _finish(self, outcome: Outcome) -> None:
        self._left -= 1
        self.outcomes.append(outcome)

    def finish(self, outcome: Outcome) -> None:
        """The end of a request that was served."""
        self._finish(outcome)

    def owned_blocks(self, request: Request, number: int) -> int:
        """Leading blocks of the prompt that a worker has now."""
        return self._view.index.longest_prefix(request.blocks).get(number, 0)


class _Life:
    """A request between its arrival and its end."""

    def __init__(self, cluster: SimulatedCluster, request: Request, choice: Choice) -> None:
        self._cluster = cluster
        self._request = request
        self._decode = cluster.decodes[choice.decode]
        self._prefill = None if choice.prefill is None else cluster.prefills[choice.prefill]
        self._first = 0.0
        computing = self._prefill or self._decode
        owned = cluster.owned_blocks(request, computing.number)
        self._tokens = max(1, request.input_tokens - owned * BLOCK_TOKENS)
        self._blocks = request.held_blocks
        self._decode_tokens = self._tokens if self._prefill is None else 0
        cluster.book(self._decode.number, 1, self._decode_tokens, self._blocks)
        self._job = Job(request, self._computed)
        if self._prefill is None:
            self._job.done = self._generated
            self._decode.compute(self._job, self._first_token)
        else:
            cluster.book(self._prefill.number, 1, self._tokens, 0)
            self._prefill.submit(self._job)

    def _first_token(self) -> None:
        self._first = self._cluster.clock.now

    def _computed(self) -> None:
        assert self._prefill is not None
        self._cluster.book(self._prefill.number, -1, self._tokens, 0)
        self._first_token()
        missing = -(-self._request.input_tokens // BLOCK_TOKENS) - self._decode.cache.match(self._request.blocks)
        arrives = self._prefill.sent(self._job, missing)
        job = Job(self._request, self._generated)
        self._cluster.clock.at(arrives, lambda: self._decode.submit(job))

    def _generated(self) -> None:
        now = self._cluster.clock.now
        self._cluster.book(self._decode.number, -1, self._decode_tokens, self._blocks)
        later = self._request.output_tokens - 1
        self._cluster.finish(
            Outcome(
                self._request,
                ttft=self._first - self._request.time,
                tpot=(now - self._first) / later if later else 0.0,
                cached_tokens=self._job.cached,
                ended=now,
            )
        )
