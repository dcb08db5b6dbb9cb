"""More sequences than the KV pools hold: they wait, are preempted, and all end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.cluster import BLOCK_BYTES, chaos_cluster
from tests.chaos.conftest import long_tiny
from tests.chaos.load import Case, Oracle, cases
from tests.chaos.nursery import Nursery

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT, ANSWER, BLOCK_TOKENS = 120, 280, 16
POOL = round(2.5 * (PROMPT + ANSWER) / BLOCK_TOKENS)  # blocks


async def test_eight_requests_end_in_pools_that_hold_two_and_a_half(tmp_path: Path, nursery: Nursery) -> None:
    prompt = cases(1, longest=2, seed=8)[0].prompt
    oracle = Oracle([Case(i, (i, *prompt * PROMPT)[:PROMPT], ANSWER) for i in range(8)])
    async with chaos_cluster(
        tmp_path, long_tiny(tmp_path), nursery, prefill=1, decode=1, kv_cache_memory=POOL * BLOCK_BYTES
    ) as cluster:
        async with cluster.channel() as channel:
            await oracle.learn(channel, at_once=1)
            assert await cluster.metric("decode-0", "splitserve_num_preemptions_total") == 0
            (await oracle.run(channel, at_once=8)).assert_all_right()
        assert await cluster.metric("decode-0", "splitserve_num_preemptions_total") > 0
