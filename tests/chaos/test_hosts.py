"""Two hosts with a network between them: requests and KV blocks cross it, and it fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.config import WorkerConfig
from tests.chaos.cluster import SECONDS, chaos_cluster
from tests.chaos.conftest import long_tiny
from tests.chaos.hosts import HERE, THERE, Host, why_not
from tests.chaos.load import Oracle, cases
from tests.chaos.nursery import Nursery

pytestmark = pytest.mark.asyncio(loop_scope="session")

FAR = "decode-1"


@pytest.mark.skipif(not SECONDS, reason="half a minute on a busy machine: make chaos")
async def test_a_host_that_is_cut_off_costs_nobody_an_answer_and_comes_back(
    tmp_path: Path, nursery: Nursery
) -> None:
    """Redis, the router, a prefill and a decode worker are here, one more decode worker is there."""
    if reason := why_not():
        pytest.skip(reason)
    oracle = Oracle(cases(200))
    model = long_tiny(tmp_path)
    with Host() as host:
        async with (
            chaos_cluster(tmp_path, model, nursery, prefill=1, decode=1, host=HERE) as cluster,
            cluster.channel() as channel,
        ):
            near = cluster.children["decode-0"]
            assert isinstance(near.config, WorkerConfig)
            config = replace(near.config, worker_id=FAR, host=THERE)
            await cluster.start(FAR, config, near.module, host.child)
            await cluster.seen()
            sent = host.bytes_sent
            await oracle.learn(channel)
            pulled = await cluster.metric(FAR, "splitserve_kv_transfer_bytes_total")
            assert cluster.planned(FAR) and host.bytes_sent - sent > pulled > 0, "blocks went to the other host"

            async def cut(answers: int) -> None:
                if answers == len(oracle.cases) // 3:
                    host.cut()

            result = await oracle.run(channel, on_answer=cut)
            result.assert_all_right()
            print(f"\nanswers paused for {result.longest_gap:.2f} s at most")
            host.mend()
            before = len(cluster.planned(FAR))
            async with asyncio.timeout(60):
                while len(cluster.planned(FAR)) == before:
                    (await oracle.run(channel, some=oracle.cases[:16])).assert_all_right()
