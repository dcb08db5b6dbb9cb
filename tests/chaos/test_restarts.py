"""Processes that are asked to end, one after the other, under load."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import grpc.aio
import pytest

from kvtransfer.idle import MAX_IDLE
from splitserve.directory import Directory
from splitserve.grpc_server import open_channel
from tests.chaos.cluster import DRAIN_TIMEOUT, SECONDS, ChaosCluster
from tests.chaos.load import Case, Oracle, ask

pytestmark = pytest.mark.asyncio(loop_scope="session")

RESTARTS = 50 if SECONDS else 3
WARM = RESTARTS // 5  # restarts after which nothing may grow any more
GROWTH = 16 << 20  # bytes
CONNECTIONS = 2 * MAX_IDLE  # that a decode worker may keep, of 3 descriptors and a task each


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


async def test_two_routers_restarted_one_after_the_other_cost_nobody_an_answer_who_asks_again(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    """Open streams end where they began; who is refused before the first token asks the other router."""
    second = "router-1"
    await cluster.start(second, replace(cluster.children["router"].config, port=0, grpc_port=0))
    done, rounds = asyncio.Event(), 0
    async with open_channel(cluster.children[second].addresses["grpc"]) as other, asyncio.TaskGroup() as group:

        async def load() -> None:
            nonlocal rounds
            while not done.is_set():
                (await oracle.run(channel, other, at_once=8)).assert_all_right()
                rounds += 1

        group.create_task(load())
        for name in ("router", second):
            began = time.monotonic()
            assert await cluster.terminate(name) == 0
            assert time.monotonic() - began < DRAIN_TIMEOUT + 1
            await cluster.restart(name)
            while await cluster.status(name, "/ready") != 200:
                await asyncio.sleep(0.02)
            if name == "router":  # before the other one goes, the client has found the way back
                async with asyncio.timeout(30):
                    await channel.channel_ready()
        done.set()
    assert rounds > 0
    assert await cluster.terminate(second) == 0
    del cluster.children[second]


async def test_an_answer_longer_than_the_drain_timeout_is_handed_over(
    cluster: ChaosCluster, channel: grpc.aio.Channel
) -> None:
    long = Case(3, (1, 2, 3) * 20, 300)  # at SLOW_SECONDS a token twice the timeout
    expected = await ask(channel, long)
    before = await cluster.retries("decode")
    cluster.arm("decode", "token", 5, "slow")
    stopping: list[asyncio.Task[int]] = []

    async def stop(tokens: int) -> None:
        if tokens >= 20 and not stopping:
            stopping.append(asyncio.create_task(cluster.terminate(cluster.last_planned("decode"))))

    answer = await ask(channel, long, on_token=stop)
    assert answer.error is None and answer.tokens == expected.tokens
    assert await stopping[0] == 0
    assert await cluster.retries("decode") == before + 1
    assert answer.seconds > DRAIN_TIMEOUT


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


@pytest.mark.timeout(120 + 10 * RESTARTS)
async def test_decode_workers_outlive_a_prefill_worker_that_restarts_again_and_again(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    decoders = [name for name in cluster.workers if name.startswith("decode")]
    pids = [cluster.children[name].pid for name in decoders]
    some, warm, before = oracle.cases[:20], {}, len(cluster.planned("prefill-0"))

    async def kill(answers: int) -> None:
        if answers == len(some) // 3:
            await cluster.kill("prefill-0")

    for i in range(RESTARTS):
        (await oracle.run(channel, some=some, on_answer=kill)).assert_all_right()
        await cluster.restart("prefill-0")
        await cluster.seen()
        (await oracle.run(channel, some=some[:8], at_once=8)).assert_all_right()
        if i == WARM:
            warm = {name: await cluster.used(name) for name in decoders}
    assert [cluster.children[name].pid for name in decoders] == pids and not cluster.dead()
    assert len(cluster.planned("prefill-0")) >= before + RESTARTS, "it was asked in between"
    await cluster.idle()
    for name, was in warm.items():
        now = await cluster.used(name)
        print(f"\n{name} after {WARM + 1} restarts {was}\n{'':<9}after {RESTARTS} {now}")
        assert now.rss - was.rss < GROWTH
        assert now.fds - was.fds <= 8 + 3 * CONNECTIONS and now.tasks - was.tasks <= 4 + CONNECTIONS
