"""Processes that are killed, at named points, under load."""

from __future__ import annotations

import signal

import grpc.aio
import pytest

from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import Case, Oracle, ask, cases

pytestmark = pytest.mark.asyncio(loop_scope="session")

KILLED = -signal.SIGKILL
[LONG] = cases(1, seed=5)
LONG = Case(1, LONG.prompt * 3, 100)  # drawn with a seed


async def test_a_prefill_worker_killed_in_the_middle_of_a_transfer_costs_nobody_an_answer(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle
) -> None:
    cluster.arm("prefill-0", "prefill", 8, "kill")
    result = await oracle.run(channel)
    result.assert_all_right()
    assert await cluster.ended("prefill-0") == KILLED
    assert await cluster.retries() > 0


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
