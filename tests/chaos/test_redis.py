"""Redis that is slow, away, or back without its memory, and a worker that comes back behind its lease."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from splitserve.directory import Directory
from splitserve.redis_client import RedisClient
from tests.chaos.cluster import SECONDS, ChaosCluster
from tests.chaos.load import Oracle

pytestmark = pytest.mark.asyncio(loop_scope="session")

AWAY = 60.0 if SECONDS else 7.0  # longer than the lease
WHOLE = 5.0  # seconds in which the index is whole again
Claims = dict[str, set[bytes]]


async def claims(redis: RedisClient) -> Claims:
    """What the directory says that each incarnation owns."""
    keys = await redis.execute("KEYS", "ss:blocks:*")
    return {key.decode().removeprefix("ss:blocks:"): set(await redis.execute("SMEMBERS", key)) for key in keys}


async def truth(cluster: ChaosCluster) -> dict[str, set[bytes]]:
    """What the workers themselves say."""
    return {name: await cluster.owned(name) for name in cluster.workers}


async def whole(cluster: ChaosCluster, directory: Directory, redis: RedisClient) -> float:
    """Waits until the directory says of every worker what it says itself; the seconds that it took."""
    began = time.monotonic()
    owned = await truth(cluster)
    assert any(owned.values()), "there is something to compare"
    async with asyncio.timeout(30):
        while True:
            listed = {s.info.id: f"{s.info.id}@{s.info.epoch}" for s in await directory.workers()}
            claimed = await claims(redis)  # who owns nothing is not in it
            if claimed == {listed.get(name, name): blocks for name, blocks in owned.items() if blocks}:
                return time.monotonic() - began
            await asyncio.sleep(0.05)


@asynccontextmanager
async def connected(cluster: ChaosCluster) -> AsyncIterator[tuple[Directory, RedisClient]]:
    """Past the link that fails."""
    redis = RedisClient(cluster.redis.url, 5.0)
    async with Directory(cluster.redis.url) as directory:
        try:
            yield directory, redis
        finally:
            await redis.close()


async def test_a_slow_redis_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    cluster.redis_link.delay = 0.25  # each way
    (await oracle.run(channel, at_once=32)).assert_all_right()
    assert cluster.redis_link.chunks_delayed > 0


@pytest.mark.parametrize(
    "empty", [False, True] if SECONDS else [True], ids=lambda e: "empty" if e else "as it was"
)
async def test_a_redis_that_was_away_costs_nobody_an_answer_and_its_index_is_whole_again(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle, empty: bool
) -> None:
    async with connected(cluster) as (directory, redis):
        await whole(cluster, directory, redis)
        before = await directory.workers()
        cluster.redis_link.refusing = True
        cluster.redis_link.cut()
        gone, answers = time.monotonic() + AWAY, 0
        while time.monotonic() < gone:
            (await oracle.run(channel)).assert_all_right()
            answers += len(oracle.cases)
        assert cluster.redis_link.connections_cut > 0
        if empty:
            await cluster.redis.restart()
        assert await directory.workers() == []
        await cluster.idle()
        cluster.redis_link.heal()
        seconds = await whole(cluster, directory, redis)
        print(f"\nRedis away for {AWAY:.0f} s, {answers} answers; index whole after {seconds:.2f} s")
        assert seconds < WHOLE
        assert [s.info for s in await directory.workers()] == [s.info for s in before]
    (await oracle.run(channel)).assert_all_right()


async def test_workers_that_were_stopped_beyond_their_lease_claim_nothing_that_is_not_theirs(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    """One comes back as what it was, the other finds that its id has been taken."""
    foreign = [bytes([i]) * 32 for i in range(3)]
    async with connected(cluster) as (directory, redis):
        await whole(cluster, directory, redis)
        before = {s.info.id: s.info for s in await directory.workers()}
        stopped = ("prefill-0", "decode-0")
        for name in stopped:
            cluster.signal(name, signal.SIGSTOP)
        async with asyncio.timeout(20):
            while {s.info.id for s in await directory.workers()} & set(stopped):
                (await oracle.run(channel, some=oracle.cases[:16])).assert_all_right()
        async with asyncio.timeout(5):  # the lease of a worker and that of its claims end one after the other
            while any(key.startswith(stopped) for key in await claims(redis)):
                await asyncio.sleep(0.02)
        taken = await directory.register(before["decode-0"])
        assert await directory.announce(taken, foreign)
        for name in stopped:
            cluster.signal(name, signal.SIGCONT)
        assert await cluster.ended("decode-0") == 1
        assert "another process" in cluster.log("decode-0")
        now = await claims(redis)
        assert now[f"decode-0@{taken.epoch}"] == set(foreign)
        assert f"decode-0@{before['decode-0'].epoch}" not in now
        await directory.unregister(taken)
        await cluster.restart("decode-0")
        await cluster.seen()
        (await oracle.run(channel)).assert_all_right()
        await cluster.idle()
        await whole(cluster, directory, redis)
        after = {s.info.id: s.info.epoch for s in await directory.workers()}
        assert after["prefill-0"] == before["prefill-0"].epoch and after["decode-0"] > taken.epoch
