"""Any order of registrations, heartbeats, claims, ended leases, stale writers and lost memory, on a real Redis:
the directory says at each moment what the rules say, and a stale incarnation changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from splitserve.cluster import Role, WorkerInfo, WorkerLoad
from splitserve.directory import Directory, HeartbeatResult
from splitserve.redis_client import RedisClient
from tests.conftest import MakeWorker

T = TypeVar("T")
IDS = ("prefill-0", "decode-0")
CHAIN = [bytes([i]) * 32 for i in range(6)]  # what is owned of it is a prefix
OTHER = [bytes([100 + i]) * 32 for i in range(4)]
LENGTHS = st.integers(0, len(CHAIN))
EXAMPLES = 15
HOUR = 3600.0  # no lease ends by itself


@dataclass
class Known:
    """What the rules say of one worker id. ``current``: the incarnation that has a lease."""

    last: int | None = None  # the epoch counter
    current: int | None = None
    load: int = 0
    claims: dict[int, set[bytes]] = field(default_factory=dict)  # by epoch

    def accepts(self, epoch: int) -> bool:
        return self.last == epoch == self.current


class DirectoryMachine(RuleBasedStateMachine):
    incarnations = Bundle("incarnations")

    def __init__(self, url: str, make_worker: MakeWorker) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._make = make_worker
        self._redis = RedisClient(url, 5.0)
        self._directory = Directory(url, lease_seconds=HOUR, timeout=5.0)
        self._run(self._redis.execute("FLUSHALL"))
        self._known = {id: Known() for id in IDS}
        self._epochs = {id: [0] for id in IDS}  # given so far

    def teardown(self) -> None:
        self._run(self._directory.close())
        self._run(self._redis.close())
        self._runner.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    # -- what workers do -----------------------------------------------------------------------------------

    @rule(target=incarnations, id=st.sampled_from(IDS))
    def register(self, id: str) -> WorkerInfo:
        info = self._run(self._directory.register(self._make(id, Role(id.partition("-")[0]))))
        known = self._known[id]
        assert info.epoch > max(self._epochs[id]), "epochs only grow, whatever Redis has lost"
        self._epochs[id].append(info.epoch)
        if known.current is not None:
            known.claims.pop(known.current, None)
        known.last = known.current = info.epoch
        known.load = 0
        return info

    @rule(info=incarnations, load=st.integers(0, 9))
    def heartbeat(self, info: WorkerInfo, load: int) -> None:
        result = self._run(self._directory.heartbeat(info, WorkerLoad(num_running=load)))
        known = self._known[info.id]
        if known.last is not None and known.last > info.epoch:
            assert result is HeartbeatResult.SUPERSEDED
            return
        assert result is (HeartbeatResult.OK if known.current == info.epoch else HeartbeatResult.LOST)
        if known.current != info.epoch:
            known.claims.pop(info.epoch, None)
        known.last = known.current = info.epoch
        known.load = load

    @rule(info=incarnations, filled=LENGTHS, others=st.sets(st.sampled_from(OTHER)))
    def fill(self, info: WorkerInfo, filled: int, others: set[bytes]) -> None:
        blocks = [*CHAIN[:filled], *others]
        accepted = self._run(self._directory.apply_block_events(info, blocks, []))
        known = self._known[info.id]
        assert accepted is (known.accepts(info.epoch) or not blocks)
        if known.accepts(info.epoch) and blocks:
            known.claims.setdefault(info.epoch, set()).update(blocks)

    @rule(info=incarnations, kept=LENGTHS)
    def evict(self, info: WorkerInfo, kept: int) -> None:
        """The tail goes first."""
        accepted = self._run(self._directory.apply_block_events(info, [], CHAIN[kept:]))
        known = self._known[info.id]
        assert accepted is (known.accepts(info.epoch) or kept == len(CHAIN))
        if known.accepts(info.epoch):
            known.claims.get(info.epoch, set()).difference_update(CHAIN[kept:])

    @rule(info=incarnations, owned=LENGTHS)
    def announce(self, info: WorkerInfo, owned: int) -> None:
        accepted = self._run(self._directory.announce(info, CHAIN[:owned]))
        known = self._known[info.id]
        assert accepted is known.accepts(info.epoch)
        if accepted:
            known.claims[info.epoch] = set(CHAIN[:owned])

    @rule(info=incarnations)
    def unregister(self, info: WorkerInfo) -> None:
        known = self._known[info.id]
        foreign = known.current not in (None, info.epoch)
        assert self._run(self._directory.unregister(info)) is not foreign
        known.claims.pop(info.epoch, None)
        if not foreign:
            known.current = None

    # -- what happens to them ------------------------------------------------------------------------------

    @rule(id=st.sampled_from(IDS))
    def lease_ends(self, id: str) -> None:
        known = self._known[id]
        self._run(self._redis.execute("PEXPIRE", f"ss:worker:{id}", 0))
        for epoch in known.claims:
            self._run(self._redis.execute("PEXPIRE", f"ss:blocks:{id}@{epoch}", 0))
        known.current = None
        known.claims.clear()

    @rule()
    def redis_loses_its_memory(self) -> None:
        self._run(self._redis.execute("FLUSHALL"))
        self._run(self._redis.execute("SCRIPT", "FLUSH"))
        self._known = {id: Known() for id in IDS}
        self._run(asyncio.sleep(0.002))  # the clock, from which epochs are taken, has gone on

    # -- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def the_directory_says_what_the_rules_say(self) -> None:
        self._run(self._compare())

    async def _compare(self) -> None:
        states = {state.info.id: state for state in await self._directory.workers()}
        live = {id: known.current for id, known in self._known.items() if known.current is not None}
        assert {id: state.info.epoch for id, state in states.items()} == live
        assert all(states[id].load.num_running == self._known[id].load for id in live)
        counters = {id: known.last for id, known in self._known.items() if known.last is not None}
        assert await self._directory.epochs(IDS) == counters
        claims = {
            f"ss:blocks:{id}@{epoch}": claimed
            for id, known in self._known.items()
            for epoch, claimed in known.claims.items()
            if claimed
        }
        keys = [key.decode() for key in await self._redis.execute("KEYS", "ss:blocks:*")]
        assert {key: set(await self._redis.execute("SMEMBERS", key)) for key in keys} == claims
        newest = [(id, epochs[-1]) for id, epochs in self._epochs.items()]
        owned = {id: self._known[id].claims.get(epoch, set()) for id, epoch in newest}
        expected = {id: sum(block in claimed for block in CHAIN) for id, claimed in owned.items()}
        assert await self._directory.longest_prefix(CHAIN, newest) == expected


def test_whatever_the_order_no_stale_incarnation_changes_anything(redis_url: str, make_worker: MakeWorker) -> None:
    run_state_machine_as_test(
        lambda: DirectoryMachine(redis_url, make_worker),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
