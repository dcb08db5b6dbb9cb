"""Random faults, one after the other, under load, for ``SPLITSERVE_CHAOS_SECONDS`` (``make chaos``)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

import grpc.aio
import httpx
import numpy as np
import pytest

from kvtransfer.idle import MAX_IDLE
from tests.chaos.cluster import SECONDS, ChaosCluster, Use
from tests.chaos.load import Oracle

pytestmark = pytest.mark.asyncio(loop_scope="session")

SEED = int(os.environ.get("SPLITSERVE_CHAOS_SEED", "1"))
PAUSE = 10.0  # between two faults, seconds
WATCH = 5.0  # between two looks at memory
LONG_LIFE = 180.0  # of a process, before its growth means anything
GROWTH = 1e6  # bytes a minute
CONNECTIONS = 2 * MAX_IDLE  # that a worker may keep, of 3 descriptors and a task each
FILES, TASKS = 16 + 3 * CONNECTIONS, 16 + CONNECTIONS


async def break_something(cluster: ChaosCluster, draw: random.Random) -> str:
    """One fault, healed when this returns."""
    kind, name = (
        draw.choice(["kill", "stop", "terminate", "redis cut", "redis slow"]),
        draw.choice(cluster.workers),
    )
    if kind == "kill":
        await cluster.kill(name)
    elif kind == "stop":
        cluster.signal(name, signal.SIGSTOP)
        await asyncio.sleep(draw.uniform(1, 8))
        cluster.signal(name, signal.SIGCONT)
    elif kind == "terminate":
        assert await cluster.terminate(name) == 0
    elif kind == "redis cut":
        cluster.redis_link.refusing = True
        cluster.redis_link.cut()
        await asyncio.sleep(draw.uniform(1, 8))
        cluster.redis_link.heal()
    else:
        cluster.redis_link.delay = 0.25
        await asyncio.sleep(draw.uniform(1, 8))
        cluster.redis_link.heal()
    for dead in cluster.dead():
        await cluster.restart(dead)
    await cluster.seen(60)
    return kind


@dataclass
class Life:
    """What one process had in use, over time."""

    times: list[float] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]

    @property
    def growth(self) -> float:
        """Bytes a minute, over the second half."""
        half = len(self.times) // 2
        rss = [use.rss for use in self.uses[half:]]
        return float(np.polyfit(self.times[half:], rss, 1)[0]) * 60


async def watch(cluster: ChaosCluster, lives: defaultdict[tuple[str, int], Life]) -> None:
    """Looks at every process that can be asked, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        for name, child in list(cluster.children.items()):
            with suppress(httpx.HTTPError):  # it is just being broken
                use = await cluster.used(name)
                lives[name, child.pid].times.append(loop.time())
                lives[name, child.pid].uses.append(use)
        await asyncio.sleep(WATCH)


@pytest.mark.skipif(not SECONDS, reason="SPLITSERVE_CHAOS_SECONDS is not set")
@pytest.mark.timeout(SECONDS + 240)
async def test_random_faults_cost_nobody_an_answer_and_leave_nothing_behind(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    loop, draw = asyncio.get_running_loop(), random.Random(SEED)
    until, faults, answers = loop.time() + SECONDS, Counter[str](), 0
    lives: defaultdict[tuple[str, int], Life] = defaultdict(Life)

    async def load() -> None:
        nonlocal answers
        while loop.time() < until:
            (await oracle.run(channel, at_once=8)).assert_all_right()
            answers += len(oracle.cases)

    async with asyncio.TaskGroup() as group:
        loading = group.create_task(load())
        watching = group.create_task(watch(cluster, lives))
        while loop.time() < until - PAUSE:
            faults[await break_something(cluster, draw)] += 1
            await asyncio.sleep(PAUSE)
        await loading
        watching.cancel()
    await cluster.idle()
    print(f"\n{SECONDS:.0f} s: {answers} answers, {dict(faults)}")
    assert answers and faults
    for (name, pid), life in lives.items():
        if life.seconds < LONG_LIFE:
            continue
        first, last = life.uses[1], life.uses[-1]
        print(
            f"{name} {pid}: {life.seconds:.0f} s, {last.rss / 1e6:.0f} MB, {life.growth / 1e6:+.2f} MB/min;"
            f" files {first.fds:.0f} -> {last.fds:.0f}, tasks {first.tasks:.0f} -> {last.tasks:.0f}"
        )
    for (name, pid), life in lives.items():
        if pid == cluster.children[name].pid and life.seconds > LONG_LIFE:
            assert life.growth < GROWTH, name
            now = await cluster.used(name)
            assert now.fds - life.uses[1].fds < FILES and now.tasks - life.uses[1].tasks < TASKS, name
