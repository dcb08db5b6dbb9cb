"""Two pools of engines, their transfers and a router's retries in one thread on a clock that is only counted.

The engines are the real ones (scheduler, block pool, prefix cache, preemption, reservations) on paper instead of
tensors: the KV of a token is a number that depends on all tokens before it, and a step checks every number that it
reads. So a block that was freed too early, shared wrongly or filled late does not pass. What breaks, and when, is
drawn from one seed. Invariant: nothing here waits for real time, so a seed always gives the same run.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from engine import Engine, EngineConfig, EngineRequest, SamplingParams
from engine.scheduler import Scheduled
from engine.sequence import Sequence as EngineSequence

BLOCK = 16  # tokens
VOCAB = 50
LEASE = 10.0
PROGRESS = 2.0  # a transfer without progress for so long has failed


def kv_of(tokens: Sequence[int]) -> list[int]:
    """What a step writes for each token."""
    values, value = [], 0
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


def answer(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(kv_of(tokens)[-1] % VOCAB)
    return tokens[len(prompt) :]


@dataclass
class PaperStep:
    items: list[tuple[EngineSequence, int, int, tuple[int, ...]]]  # sequence, start, end, block table
    sequences: list[EngineSequence]  # those that sample
    drawn: bool = True


class PaperRunner:
    """What `Engine` uses of a runner. Writes when a step is collected, as late as a device might."""

    max_model_len = 1000
    fingerprint = bytes(32)

    def __init__(self, blocks: int, runs_ahead: bool) -> None:
        self.num_blocks = blocks
        self.runs_ahead = runs_ahead
        self.kv: list[list[int | None]] = [[None] * BLOCK for _ in range(blocks)]

    def launch(self, scheduled: list[Scheduled], before: PaperStep | None = None) -> PaperStep:
        items = [(s.sequence, s.start, s.end, tuple(s.sequence.blocks)) for s in scheduled]
        return PaperStep(items, [s.sequence for s in scheduled if s.samples])

    def collect(self, step: PaperStep) -> list[tuple[int, None]]:
        tokens = {sequence: self._compute(sequence, *rest) for sequence, *rest in step.items}
        return [(tokens[sequence], None) for sequence in step.sequences]

    def _compute(self, sequence: EngineSequence, start: int, end: int, blocks: tuple[int, ...]) -> int:
        values = kv_of(sequence.tokens[:end])
        if len(values) == end:  # else it was ended while the step was under way: what is written means nothing
            read = [self.kv[blocks[p // BLOCK]][p % BLOCK] for p in range(start)]
            assert read == values[:start], f"{sequence.id} read what is not its own"
        for p in range(start, end):
            self.kv[blocks[p // BLOCK]][p % BLOCK] = values[p] if p < len(values) else -1
        return (values or [0])[-1] % VOCAB


def make_engine(blocks: int, runs_ahead: bool) -> Engine:
    config = EngineConfig("paper", block_tokens=BLOCK, max_num_seqs=4, max_num_batched_tokens=40)
    files = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB, eos_token_ids=()))
    return Engine(config, cast(Any, files), cast(Any, PaperRunner(blocks, runs_ahead)))


@dataclass(eq=False)
class Worker:
    """``blocks`` are few, so that sequences are preempted and wait."""

    blocks: int
    runs_ahead: bool
    engine: Engine = field(init=False)
    attempts: dict[str, Attempt] = field(default_factory=dict)  # by request id in the engine

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.engine = make_engine(self.blocks, self.runs_ahead)
        self.attempts = {}

    @property
    def kv(self) -> list[list[int | None]]:
        return cast(PaperRunner, self.engine.runner).kv


@dataclass(eq=False)
class Client:
    prompt: list[int]
    count: int
    given: list[int] = field(default_factory=list)
    left: bool = False

    @property
    def done(self) -> bool:
        return self.left or len(self.given) == self.count


@dataclass(eq=False)
class Attempt:
    """A request on one pair of workers. ``source`` is None where the decode worker computes alone."""

    id: str
    client: Client
    source: Worker | None
    target: Worker | None  # None: one token is left, nothing is pulled
    offered: tuple[int, ...] = ()  # blocks of the source that are complete
    first: int | None = None
    reserved: tuple[int, ...] = ()
    arrived: int = -1  # blocks in place; -1: nothing is reserved yet
    moved_at: float = 0.0
    over: bool = False


class Simulation:
    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.now = 0.0
        self.faults: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        ahead = draw.random() < 0.5
        self.prefills = [Worker(draw.choice([13, 18]), ahead) for _ in range(2)]
        self.decodes = [Worker(draw.choice([13, 18]), ahead) for _ in range(2)]
        shared = [draw.randrange(VOCAB) for _ in range(64)]
        self.clients = [
            Client(
                shared[: draw.randrange(65)] + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 80))],
                draw.randrange(1, 40),
            )
            for _ in range(8)
        ]

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefills, *self.decodes]

    def run(self) -> None:
        """Until nothing is left to do. Asserts that the books of every engine are right after each event."""
        for client in self.clients:
            self._after(self.draw.uniform(0, 15), lambda c=client: self._begin(c))
            if self.draw.random() < 0.2:
                self._after(self.draw.uniform(0, 40), lambda c=client: self._leave(c))
        for worker in self.workers:
            self._after(self.draw.random(), lambda w=worker: self._step(w))
            if self.draw.random() < 0.4:
                self._after(self.draw.uniform(2, 40), lambda w=worker: self._crash(w))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            assert self.now < 5000, "it never ends"
            event()
            for worker in self.workers:
                worker.engine.check_integrity()

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._ids), event))

    # -- the router ----------------------------------------------------------------------------------------

    def _begin(self, client: Client) -> None:
        if client.done:
            return
        target: Worker | None = self.draw.choice(self.decodes)
        source = self.draw.choice(self.prefills) if self.draw.random() < 0.8 else None
        if source is not None and client.count - len(client.given) == 1:
            target = None
        attempt = Attempt(f"r{next(self._ids)}", client, source, target, moved_at=self.now)
        tokens = [*client.prompt, *client.given]
        params = SamplingParams(temperature=0, max_tokens=client.count, ignore_eos=True)
        for worker, export in ((source, True), (target, False)):
            if worker is not None:
                request = EngineRequest(attempt.id, tokens, params, len(client.prompt), export=export)
                worker.engine.add(request, loads=not export and source is not None)
                worker.attempts[attempt.id] = attempt
        if source is not None and target is not None:
            self._after(0.1, lambda: self._pull(attempt))

    def _leave(self, client: Client) -> None:
        for attempt in {a for w in self.workers for a in w.attempts.values() if a.client is client}:
            self._end(attempt)
        client.left = client.left or not client.done

    def _fail(self, attempt: Attempt, why: str) -> None:
        """Goes on elsewhere from what the client has."""
        if not attempt.over:
            self.faults.append(why)
            self._end(attempt)
            self._after(0.1, lambda: self._begin(attempt.client))

    def _end(self, attempt: Attempt) -> None:
        """The target lets go at once, the source when it hears of it, at the latest with its lease."""
        attempt.over = True
        source, target = attempt.source, attempt.target
        if target is not None and target.attempts.pop(attempt.id, None):
            loaded = None if attempt.arrived < 0 else min(attempt.arrived * BLOCK, self._known(attempt))
            target.engine.abort(attempt.id, loaded_tokens=loaded)
        if source is not None and attempt.id in source.attempts:
            self._after(self.draw.choice([0.05, LEASE]), lambda: self._let_go(source, attempt))

    def _let_go(self, source: Worker, attempt: Attempt) -> None:
        if source.attempts.pop(attempt.id, None):
            source.engine.abort(attempt.id)
            source.engine.release(attempt.id)

    def _known(self, attempt: Attempt) -> int:
        """Tokens that the attempt began with."""
        given = len(attempt.client.given) - (attempt.first is not None)
        return len(attempt.client.prompt) + given

    # -- workers -------------------------------------------------------------------------------------------

    def _crash(self, worker: Worker) -> None:
        lost, attempts = worker.attempts, list(worker.attempts.values())
        worker.restart()
        for attempt in attempts:
            if attempt.over:
                continue
            other = attempt.target if worker is attempt.source else attempt.source
            if (
                other is attempt.target
                and attempt.first is not None
                and attempt.arrived >= len(attempt.reserved) > 0
            ):
                continue  # all has been pulled: the source is not needed any more
            self._fail(attempt, "crash")
        lost.clear()

    def _step(self, worker: Worker) -> None:
        if worker.engine.has_work:
            result = worker.engine.step()
            assert not result.failed
            for reservation in result.reserved:
                attempt = worker.attempts[reservation.request_id]
                attempt.reserved = reservation.blocks
                attempt.arrived = reservation.cached_tokens // BLOCK
                attempt.moved_at = self.now
            for id, output in result.outputs:
                if (attempt := worker.attempts.get(id)) is None:
                    continue
                tokens = [token.token for token in output.tokens]
                if not attempt.over:
                    attempt.client.given += tokens
                if worker is attempt.source:
                    known = self._known(attempt) if output.finished else output.num_computed // BLOCK * BLOCK
                    attempt.offered = output.blocks[: -(-known // BLOCK)]
                    attempt.first = tokens[0] if tokens and not attempt.over else attempt.first
                    if output.finished and attempt.target is None:
                        self._let_go(worker, attempt)
                elif output.finished:
                    del worker.attempts[id]
        if self._events:
            idle = not worker.engine.has_work and all(client.done for client in self.clients)
            if not idle:
                self._after(self.draw.uniform(0.5, 1.5), lambda: self._step(worker))

    def _pull(self, attempt: Attempt) -> None:
        """Moves one block, or finds that there is none yet, or that the link has failed."""
        source, target = attempt.source, attempt.target
        assert source is not None and target is not None
        if attempt.over:
            return
        if attempt.arrived < 0:
            self._after(0.3, lambda: self._pull(attempt))
        elif attempt.first is not None and attempt.arrived == len(attempt.reserved):
            if not target.engine.start_loaded(attempt.id, self._known(attempt), attempt.first):
                del target.attempts[attempt.id]
            attempt.source = None  # done: whatever becomes of it does not matter here any more
            self._after(self.draw.choice([0.05, 0.05, LEASE]), lambda: self._let_go(source, attempt))
        elif attempt.arrived >= len(attempt.offered):
            self._after(0.3, lambda: self._pull(attempt))  # it computes, and says that it lives
        elif self.draw.random() < 0.03:
            self._after(PROGRESS, lambda: self._fail(attempt, "stalled"))
        else:
            moved = source.kv[attempt.offered[attempt.arrived]]
            target.kv[attempt.reserved[attempt.arrived]][:] = moved
            attempt.arrived += 1
            self._after(self.draw.uniform(0.05, 0.5), lambda: self._pull(attempt))
