"""Engines that fail or make no progress, in a process of their own."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from splitserve.directory import Directory
from splitserve.grpc_server import check_health
from tests.chaos.cluster import STEP_TIMEOUT, ChaosCluster
from tests.chaos.load import Case, Oracle, ask, cases

pytestmark = pytest.mark.asyncio(loop_scope="session")

[SHORT] = cases(1, seed=5)
LONG = Case(1, SHORT.prompt * 3, 100)


async def test_an_engine_whose_thread_has_failed_ends_its_process_and_no_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    expected = await ask(channel, LONG)
    cluster.arm("decode", "token", 50, "break")
    answer = await ask(channel, LONG)
    assert answer.error is None and answer.tokens == expected.tokens
    assert await cluster.ended(await cluster.one_died(), 5) == 1


async def test_an_engine_that_makes_no_progress_takes_its_worker_out_of_service(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    expected = await ask(channel, LONG)
    cluster.arm("decode", "token", 50, "hang")
    answer = await ask(channel, LONG)
    assert answer.error is None and answer.tokens == expected.tokens
    assert STEP_TIMEOUT / 2 < answer.gap < STEP_TIMEOUT + 2
    live = {name: await cluster.status(name, "/live") for name in cluster.workers}
    [stuck] = [name for name, status in live.items() if status == 503]
    assert await cluster.status(stuck, "/ready") == 503
    assert not await check_health(cluster.children[stuck].addresses["grpc"])
    async with Directory(cluster.redis.url) as directory, asyncio.timeout(3):
        while not any(s.load.draining and s.info.id == stuck for s in await directory.workers()):
            await asyncio.sleep(0.05)
    await cluster.kill(stuck)


async def test_a_worker_whose_id_was_taken_lets_its_requests_end_and_leaves(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    async with Directory(cluster.redis.url) as directory:
        [info] = [s.info for s in await directory.workers() if s.info.id == "decode-0"]

        async def take(answers: int) -> None:
            if answers == len(oracle.cases) // 3:
                await directory.unregister(await directory.register(info))

        (await oracle.run(channel, on_answer=take)).assert_all_right()
    assert await cluster.ended("decode-0", 10) == 1
    assert "another process" in cluster.log("decode-0")
