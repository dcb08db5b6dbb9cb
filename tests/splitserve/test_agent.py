from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from splitserve.agent import AgentConfig, WorkerAgent
from splitserve.cluster import WorkerInfo, WorkerLoad
from splitserve.directory import Directory
from splitserve.directory_records import TransferRecord, TransferState
from splitserve.errors import Unavailable
from splitserve.redis_client import RedisClient
from splitserve.redis_server import PrivateRedis

FAST = AgentConfig(heartbeat_seconds=0.05, flush_seconds=0.01)


class Pool:
    """What an engine tells its agent."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, None] = {}
        self.load = WorkerLoad()
        self._filled: list[bytes] = []
        self._evicted: list[bytes] = []

    def fill(self, block: bytes) -> None:
        self.blocks[block] = None
        if block in self._evicted:
            self._evicted.remove(block)
        self._filled.append(block)

    def evict(self, block: bytes) -> None:
        del self.blocks[block]
        if block in self._filled:
            self._filled.remove(block)
        self._evicted.append(block)

    def take(self) -> tuple[list[bytes], list[bytes]]:
        events = (self._filled, self._evicted)
        self._filled, self._evicted = [], []
        return events


def chain(count: int) -> list[bytes]:
    return [random.Random(i).randbytes(32) for i in range(count)]


async def eventually(check: Callable[[], Coroutine[Any, Any, bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await check():
            await asyncio.sleep(0.01)


def agent_of(
    directory: Directory, info: WorkerInfo, pool: Pool, config: AgentConfig = FAST, **options: Any
) -> WorkerAgent:
    return WorkerAgent(
        directory, info, lambda: pool.load, pool.take, lambda: list(pool.blocks), config=config, **options
    )


def owns(directory: Directory, agent: WorkerAgent, pool: Pool, blocks: list[bytes]) -> Callable[..., Any]:
    """Whether Redis lists exactly ``blocks`` for the agent's worker."""

    async def check() -> bool:
        client = directory._redis
        try:
            found = await client.execute("SMEMBERS", f"ss:blocks:{agent.info.id}@{agent.info.epoch}")
        except Unavailable:
            return False
        return set(found) == set(blocks)

    return check


@asynccontextmanager
async def running(directory: Directory, info: WorkerInfo, pool: Pool) -> AsyncIterator[WorkerAgent]:
    async with agent_of(directory, info, pool) as agent:
        yield agent


async def test_it_registers_and_leaves(directory: Directory, worker: WorkerInfo) -> None:
    async with running(directory, worker, Pool()) as agent:
        assert agent.info.epoch > 0
        assert [state.info for state in await directory.workers()] == [agent.info]
    assert await directory.workers() == []


async def test_blocks_owned_before_the_start_are_announced(directory: Directory, worker: WorkerInfo) -> None:
    pool = Pool()
    for block in chain(3):
        pool.fill(block)
    pool.take()
    async with running(directory, worker, pool) as agent:
        await eventually(owns(directory, agent, pool, chain(3)))


async def test_block_events_reach_the_directory(directory: Directory, worker: WorkerInfo) -> None:
    pool = Pool()
    async with running(directory, worker, pool) as agent:
        for block in chain(5):
            pool.fill(block)
        await eventually(owns(directory, agent, pool, chain(5)))
        for block in chain(5)[3:]:
            pool.evict(block)
        await eventually(owns(directory, agent, pool, chain(3)))


async def test_load_and_draining_are_published(directory: Directory, worker: WorkerInfo) -> None:
    pool = Pool()
    async with agent_of(directory, worker, pool, AgentConfig(heartbeat_seconds=60)) as agent:
        pool.load = WorkerLoad(num_running=3)
        agent.set_draining()

        async def published() -> bool:
            [state] = await directory.workers()
            return state.load == WorkerLoad(num_running=3, draining=True)

        await eventually(published)


async def test_transfers_are_noted(directory: Directory, worker: WorkerInfo) -> None:
    record = TransferRecord(bytes(16), TransferState.READY, source="p0", num_blocks=4)
    async with running(directory, worker, Pool()) as agent:
        agent.record_transfer(record)

        async def noted() -> bool:
            return await directory.transfer(bytes(16)) == record

        await eventually(noted)


async def test_a_redis_that_comes_back_empty_is_told_everything_again(
    own_redis: PrivateRedis, worker: WorkerInfo, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pool = Pool()
    async with Directory(own_redis.url) as directory, running(directory, worker, pool) as agent:
        for block in chain(3):
            pool.fill(block)
        await eventually(owns(directory, agent, pool, chain(3)))
        os.kill(own_redis.pid, signal.SIGKILL)
        await own_redis.wait()
        pool.fill(chain(4)[3])
        await asyncio.sleep(0.3)
        await own_redis.restart()
        await eventually(owns(directory, agent, pool, chain(4)))
        assert [state.info for state in await directory.workers()] == [agent.info]
    assert caplog.text.count("is away") == 1


async def test_a_lease_that_ended_while_redis_was_silent_is_taken_again(
    own_redis: PrivateRedis, worker: WorkerInfo
) -> None:
    pool = Pool()
    async with (
        Directory(own_redis.url, lease_seconds=1.0, timeout=0.5) as directory,
        running(directory, worker, pool) as agent,
    ):
        for block in chain(3):
            pool.fill(block)
        await eventually(owns(directory, agent, pool, chain(3)))
        os.kill(own_redis.pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        os.kill(own_redis.pid, signal.SIGCONT)
        await eventually(owns(directory, agent, pool, chain(3)))
        assert agent.connected


async def test_a_superseded_agent_says_so_and_is_silent(directory: Directory, worker: WorkerInfo) -> None:
    pool, called = Pool(), asyncio.Event()
    async with agent_of(directory, worker, pool, on_superseded=called.set) as old:
        new = await directory.register(worker)
        async with asyncio.timeout(30):
            await called.wait()
            await old.wait()
        pool.fill(chain(1)[0])
    assert [state.info for state in await directory.workers()] == [new]


async def test_leaving_without_redis_ends_within_the_deadline(own_redis: PrivateRedis, worker: WorkerInfo) -> None:
    async with Directory(own_redis.url, timeout=1.0) as directory:
        agent = agent_of(directory, worker, Pool())
        await agent.start()
        os.kill(own_redis.pid, signal.SIGSTOP)
        async with asyncio.timeout(30):
            await agent.close()
        os.kill(own_redis.pid, signal.SIGCONT)


async def test_a_broken_engine_is_not_hidden(
    directory: Directory, worker: WorkerInfo, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> WorkerLoad:
        raise ZeroDivisionError

    agent = WorkerAgent(directory, worker, broken, lambda: ([], []), list, config=FAST)
    await agent.start()
    with pytest.raises(ZeroDivisionError):
        await agent.wait()
    with pytest.raises(ZeroDivisionError):
        await agent.close()
    assert "agent failed" in caplog.text
    assert await directory.workers() == []


async def test_starting_without_redis_raises(worker: WorkerInfo) -> None:
    directory = Directory("redis://127.0.0.1:1")
    with pytest.raises(Unavailable):
        await agent_of(directory, worker, Pool()).start()
    await directory.close()


async def test_nothing_is_asked_of_redis_twice_for_nothing(redis_url: str, worker: WorkerInfo) -> None:
    async with Directory(redis_url) as directory, agent_of(directory, worker, Pool(), AgentConfig(60, 0.005)):
        client = RedisClient(redis_url, 5.0)
        await asyncio.sleep(0.1)
        before = (await client.execute("INFO", "stats"))["total_commands_processed"]
        await asyncio.sleep(0.2)
        after = (await client.execute("INFO", "stats"))["total_commands_processed"]
        await client.close()
    assert after - before == 1
