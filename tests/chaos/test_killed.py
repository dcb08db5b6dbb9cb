"""Processes that are killed, at named points, under load."""

from __future__ import annotations

import asyncio
import signal
import time

import grpc.aio
import pytest

from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import UNAVAILABLE, Case, Oracle, ask, cases

pytestmark = pytest.mark.asyncio(loop_scope="session")

KILLED = -signal.SIGKILL
POISON = [7] * 40
[LONG] = cases(1, seed=5)
LONG = Case(1, LONG.prompt * 3, 100)  # drawn with a seed


async def test_a_prefill_worker_killed_in_the_middle_of_a_transfer_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    cluster.arm("prefill-0", "prefill", 8, "kill")
    before = await cluster.retries()
    noticing = asyncio.create_task(seconds_until_noticed(cluster, "prefill-0", before))
    result = await oracle.run(channel)
    result.assert_all_right()
    assert await cluster.ended("prefill-0") == KILLED
    assert await cluster.retries() > before
    noticed = await noticing
    print(f"a killed prefill worker's work was begun elsewhere after {noticed:.2f} s")
    assert noticed < 1


async def seconds_until_noticed(cluster: ChaosCluster, name: str, retries: float) -> float:
    """From the death of a worker to the first retry of what it did."""
    async with asyncio.timeout(60):
        while name not in cluster.dead():
            await asyncio.sleep(0.005)
        began = time.monotonic()
        while await cluster.retries() == retries:
            await asyncio.sleep(0.005)
    return time.monotonic() - began


@pytest.mark.parametrize("index", [1, 50, 99], ids=["token 1", "middle", "last"])
async def test_a_decode_worker_killed_leaves_the_stream_whole(
    cluster: ChaosCluster, channel: grpc.aio.Channel, index: int
) -> None:
    expected = await ask(channel, LONG)
    before = await cluster.retries()
    cluster.arm("decode", "token", index, "kill")
    answer = await ask(channel, LONG)
    assert answer.error is None and answer.tokens == expected.tokens and len(answer.tokens) == LONG.new
    assert await cluster.ended(await cluster.one_died()) == KILLED
    assert await cluster.retries() == before + 1
    assert answer.gap < 2 + expected.first


async def test_a_decode_worker_killed_under_load_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    before = await cluster.retries()

    async def kill(answers: int) -> None:
        if answers == len(oracle.cases) // 3:
            await cluster.kill("decode-0")

    result = await oracle.run(channel, on_answer=kill)
    result.assert_all_right()
    assert await cluster.retries() > before


async def test_all_prefill_workers_killed_at_once_leave_decode_workers_that_serve_alone(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    async def kill(answers: int) -> None:
        if answers == len(oracle.cases) // 3:
            await asyncio.gather(*(cluster.kill(f"prefill-{i}") for i in range(2)))

    (await oracle.run(channel, on_answer=kill)).assert_all_right()
    assert set(cluster.dead()) == {"prefill-0", "prefill-1"}
    (await oracle.run(channel)).assert_all_right()


async def test_a_request_that_kills_its_workers_takes_three_of_them_and_fails_alone(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    """A bug of an engine that one prompt sets off: the request is tried three times, then it is refused."""
    poison = Case(0, tuple(POISON), 100)
    cluster.poison(POISON)
    answer = await ask(channel, poison)
    cluster.cure()
    assert answer.error is not None and answer.error.startswith(UNAVAILABLE)
    async with asyncio.timeout(20):
        while len(cluster.dead()) < 2:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert len(cluster.dead()) <= 3  # less where a try ended by the silence of a machine with much else to do
    (await oracle.run(channel)).assert_all_right()
