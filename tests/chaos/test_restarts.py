"""Processes that are asked to end, one after the other, under load."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest

from splitserve.directory import Directory
from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import Case, Oracle, ask
from tests.chaos.test_soak import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_rolling_restart_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    done = asyncio.Event()

    async def load() -> int:
        rounds = 0
        while not done.is_set():
            (await oracle.run(channel, at_once=8)).assert_all_right()
            rounds += 1
        return rounds

    loading = asyncio.create_task(load())
    async with Directory(cluster.redis.url) as directory:
        before = {s.info.id: s.info.epoch for s in await directory.workers()}
        for name in cluster.workers[:: 1 if SECONDS else 2]:  # one of each role in the short version
            began = time.monotonic()
            assert await cluster.terminate(name) == 0
            assert time.monotonic() - began < cluster.children[name].config.drain_timeout + 1
            await cluster.restart(name)
            await cluster.seen()
        after = {s.info.id: s.info.epoch for s in await directory.workers()}
    done.set()
    assert await loading > 0
    assert sum(after[name] > before[name] for name in before) >= 2


async def test_a_killed_router_is_ready_again_within_seconds_and_leaves_no_work_behind(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    asking = asyncio.create_task(ask(channel, Case(2, (1, 2, 3) * 20, 3000)))
    while not sum([await cluster.metric(n, "splitserve_num_requests_running") for n in cluster.workers]):
        await asyncio.sleep(0.01)
    await cluster.kill("router")
    began = time.monotonic()
    await cluster.idle(3)
    freed = time.monotonic() - began
    began = time.monotonic()
    await cluster.restart("router")
    while await cluster.status("router", "/ready") != 200:
        await asyncio.sleep(0.02)
    print(f"\nwork freed after {freed:.2f} s, router ready after {time.monotonic() - began:.2f} s")
    assert (await asking).error is not None
    assert time.monotonic() - began < 10  # 3 s on a quiet machine
