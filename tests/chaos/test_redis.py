"""Redis that is slow, away, or back without its memory."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest

from splitserve.directory import Directory
from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import Oracle

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_slow_redis_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    cluster.redis_link.delay = 0.25  # each way
    (await oracle.run(channel, at_once=32)).assert_all_right()
    assert cluster.redis_link.chunks_delayed > 0


async def test_a_redis_that_comes_back_empty_costs_nobody_an_answer_and_is_whole_again(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    async with Directory(cluster.redis.url) as directory:
        async with asyncio.timeout(20):
            while len(before := await directory.workers()) < len(cluster.workers):
                await asyncio.sleep(0.05)
        cluster.redis_link.refusing = True
        cluster.redis_link.cut()
        (await oracle.run(channel)).assert_all_right()
        assert cluster.redis_link.connections_cut > 0
        await cluster.redis.restart()
        assert await directory.workers() == []
        cluster.redis_link.heal()
        began = time.monotonic()
        async with asyncio.timeout(20):
            while len(after := await directory.workers()) < len(before):
                await asyncio.sleep(0.05)
        print(f"\nindex whole after {time.monotonic() - began:.2f} s")
        assert [s.info for s in after] == [s.info for s in before]
    (await oracle.run(channel)).assert_all_right()
