"""Rules of routing, side by side: ours is ``router.policy.plan`` itself, the others are written from descriptions.

- round robin: the next worker of each pool.
- least loaded: the worker with the fewest requests of this router.
- Dynamo's KV router, as its documents describe disaggregated serving: the prefill worker with the least
  ``active prefill tokens + uncached tokens``, the decode worker with the least active blocks (no overlap there),
  temperature 0.
- SGLang's cache-aware router, defaults of its gateway (0.3, 64, 1.5): for prefill the worker whose history shares
  most with the prompt if that is more than ``cache_threshold`` of it, else the one with the smallest history; the
  least loaded one while loads differ by more than both thresholds. For decode the less loaded of two at random.

A rule sees what a router of its kind sees: its own requests at once, caches through the index (SGLang's: its own
history), and ours in addition the workers' own figures as old as their last heartbeat.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from bench.sim.cache import Index
from bench.sim.model import BLOCK_TOKENS, Hardware, Request
from router.planner import ANNOUNCE_SECONDS
from router.policy import Demand, PolicyConfig, plan
from router.recent_prompts import RecentPrompts, either
from splitserve.cluster import Role, WorkerInfo, WorkerLoad, WorkerState


@dataclass(slots=True)
class Tally:
    """What a router knows of one worker by its own book-keeping."""

    requests: int = 0
    tokens: int = 0  # to be computed, by what was cached when it was sent
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Workers by number within their pool; ``prefill`` is None: the decode worker computes the prompt."""

    prefill: int | None
    decode: int


@dataclass(slots=True)
class View:
    """What rules may look at. Workers are numbered through: prefill workers first, then decode workers."""

    hardware: Hardware
    prefills: int
    decodes: int
    index: Index
    tallies: list[Tally]
    measured: list[WorkerLoad]  # of the last heartbeat
    since: list[Tally] = field(default_factory=list)  # what was sent after it

    def uncached(self, request: Request, owned: int) -> int:
        return max(1, request.input_tokens - owned * BLOCK_TOKENS)


class Rule(Protocol):
    """Chooses workers. Raises SplitServeError to refuse."""

    name: str

    def choose(self, request: Request, view: View) -> Choice: ...


def _least(numbers: Sequence[int], cost: Callable[[int], float], rng: random.Random) -> int:
    costs = [cost(number) for number in numbers]
    least = min(costs)
    return rng.choice([number for number, c in zip(numbers, costs, strict=True) if c == least])


class RoundRobin:
    name = "round robin"

    def __init__(self, rng: random.Random) -> None:
        self._next = 0

    def choose(self, request: Request, view: View) -> Choice:
        self._next += 1
        return Choice(self._next % view.prefills, self._next % view.decodes)


class LeastLoaded:
    name = "least loaded"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, request: Request, view: View) -> Choice:
        def load(number: int) -> float:
            return view.tallies[number].requests

        prefill = _least(range(view.prefills), load, self._rng)
        decode = _least(range(view.prefills, view.prefills + view.decodes), load, self._rng)
        return Choice(prefill, decode - view.prefills)


class DynamoKv:
    name = "Dynamo KV"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, request: Request, view: View) -> Choice:
        owned = view.index.longest_prefix(request.blocks)

        def prefill_cost(number: int) -> float:
            return view.tallies[number].tokens + view.uncached(request, owned.get(number, 0))

        def decode_cost(number: int) -> float:
            return view.tallies[number].blocks

        prefill = _least(range(view.prefills), prefill_cost, self._rng)
        decode = _least(range(view.prefills, view.prefills + view.decodes), decode_cost, self._rng)
        return Choice(prefill, decode - view.prefills)


class SglangCacheAware:
    name = "SGLang cache-aware"
    cache_threshold = 0.3
    abs_threshold = 64
    rel_threshold = 1.5

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._history = Index()
        self._sizes: dict[int, int] = {}

    def choose(self, request: Request, view: View) -> Choice:
        loads = [view.tallies[number].requests for number in range(view.prefills)]
        most, fewest = max(loads), min(loads)
        shared = self._history.longest_prefix(request.blocks)
        if most - fewest > self.abs_threshold and most > self.rel_threshold * fewest:
            prefill = _least(range(view.prefills), lambda number: loads[number], self._rng)
        else:
            best = max(shared, key=lambda number: (shared[number], -number), default=None)
            if best is not None and shared[best] * BLOCK_TOKENS > self.cache_threshold * request.input_tokens:
                prefill = best
            else:
                prefill = _least(range(view.prefills), lambda number: self._sizes.get(number, 0), self._rng)
        for block in request.blocks[shared.get(prefill, 0) :]:
            self._history.add(block, prefill)
            self._sizes[prefill] = self._sizes.get(prefill, 0) + 1
        pair = self._rng.sample(range(view.decodes), min(2, view.decodes))
        return Choice(prefill, min(pair, key=lambda number: view.tallies[view.prefills + number].requests))


class SplitServe:
    """The policy that the router runs, on states as its view of the cluster would build them."""

    name = "SplitServe"

    def __init__(self, rng: random.Random, config: PolicyConfig | None = None) -> None:
        self._rng = rng
        self._config = config or PolicyConfig()
        self._infos: list[WorkerInfo] = []
        self._recent: RecentPrompts[int] = RecentPrompts()

    def choose(self, request: Request, view: View) -> Choice:
        if not self._infos:
            self._infos = [_info(number, view) for number in range(view.prefills + view.decodes)]
        states = [
            WorkerState(info, _with_sent(load, sent))
            for info, load, sent in zip(self._infos, view.measured, view.since, strict=True)
        ]
        known = view.index.longest_prefix(request.blocks)
        chosen = plan(
            Demand(request.input_tokens, request.output_tokens),
            either(
                {self._infos[number].id: blocks for number, blocks in known.items()},
                self._recent.longest_prefix(request.blocks, request.time),
            ),
            states,
            self._config,
            rng=self._rng,
        )
        prefill = None
        if chosen.prefill is not None:
            until = request.time + chosen.first_token_seconds + ANNOUNCE_SECONDS
            self._recent.add(chosen.prefill.info.id, request.blocks, until)
            prefill = int(chosen.prefill.info.id)
        return Choice(prefill, int(chosen.decode.info.id) - view.prefills)


def _info(number: int, view: View) -> WorkerInfo:
    hardware = view.hardware
    return WorkerInfo(
        id=str(number),
        role=Role.PREFILL if number < view.prefills else Role.DECODE,
        model="model",
        fingerprint="00",
        grpc_address="",
        block_tokens=BLOCK_TOKENS,
        num_blocks=hardware.pool_blocks,
        max_num_seqs=hardware.max_num_seqs,
        max_model_len=hardware.max_model_len,
        block_bytes=BLOCK_TOKENS * hardware.kv_bytes_per_token,
    )


def _with_sent(load: WorkerLoad, sent: Tally) -> WorkerLoad:
    if not sent.requests:
        return load
    return replace(
        load,
        num_waiting=load.num_waiting + sent.requests,
        queued_tokens=load.queued_tokens + sent.tokens,
        used_blocks=load.used_blocks + sent.blocks,
    )


RULES: tuple[Callable[[random.Random], Rule], ...] = (
    SplitServe,
    RoundRobin,
    LeastLoaded,
    DynamoKv,
    SglangCacheAware,
)
