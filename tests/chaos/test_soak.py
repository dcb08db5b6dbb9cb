"""Random faults, one after the other, under load, for ``SPLITSERVE_CHAOS_SECONDS`` (``make chaos``)."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter

import grpc.aio
import pytest

from tests.chaos.cluster import SECONDS, ChaosCluster
from tests.chaos.load import Oracle

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAUSE = 10.0  # between two faults, seconds


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


@pytest.mark.skipif(not SECONDS, reason="SPLITSERVE_CHAOS_SECONDS is not set")
@pytest.mark.timeout(SECONDS + 240)
async def test_random_faults_cost_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    loop, draw = asyncio.get_running_loop(), random.Random(1)
    until, faults, answers = loop.time() + SECONDS, Counter[str](), 0

    async def load() -> None:
        nonlocal answers
        while loop.time() < until:
            (await oracle.run(channel, at_once=8)).assert_all_right()
            answers += len(oracle.cases)

    async with asyncio.TaskGroup() as group:
        group.create_task(load())
        while loop.time() < until - PAUSE:
            faults[await break_something(cluster, draw)] += 1
            await asyncio.sleep(PAUSE)
    print(f"\n{SECONDS:.0f} s: {answers} answers, {dict(faults)}")
    assert answers and faults
