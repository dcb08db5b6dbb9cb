"""The protocol in simulated time: thousands of transfers in bad weather, each of them ends as it must.

A seed is an order of events: slow, stalled and broken connections, a source that fails, a puller that gives up
or pulls again. ``SPLITSERVE_SIMULATED_TRANSFERS`` is how many seeds.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable
from typing import TypeVar

import numpy as np
import pytest

from kvtransfer import BlockMemory, BlockServer, KvHandle, MemoryTransport, Publication, PullClient, ReleaseReason
from splitserve.errors import TransferFailed
from splitserve.layout import KVLayout

from .simulated import Weather, WeatheredTransport, simulate

SEEDS = int(os.environ.get("SPLITSERVE_SIMULATED_TRANSFERS", "200"))
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32")  # 512 bytes a block
FINGERPRINT = b"\x33" * 32
LEASE = 10.0
TIMEOUT = 2.0
TOKEN = 99
T = TypeVar("T")


class Transfer:
    """One transfer of a few blocks under the weather of ``seed``."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.blocks = draw.randrange(1, 40)
        self.ends: list[str] = []  # of the pulls
        self.source_fails = draw.random() < 0.15
        self.weather = Weather(
            draw,
            slow=draw.choice([0.0, 0.001, 0.05, 0.4]),
            stalls_at=draw.uniform(0, 6) if draw.random() < 0.25 else None,
            breaks_at=draw.uniform(0, 6) if draw.random() < 0.25 else None,
        )
        self.source = np.frombuffer(draw.randbytes(self.blocks * LAYOUT.block_bytes), dtype=np.uint8).copy()
        self.target = np.zeros_like(self.source)
        self.late: np.ndarray | None = None  # the target as the last pull left it

    async def run(self) -> ReleaseReason:
        """Asserts on the way what must hold."""
        transport = WeatheredTransport(MemoryTransport(), self.weather)
        source, target = (BlockMemory(pool, LAYOUT, self.blocks) for pool in (self.source, self.target))
        server = BlockServer(source, FINGERPRINT, "p0", 3, [transport], lease_seconds=LEASE)
        client = PullClient(target, FINGERPRINT, "d0", 5, [transport], progress_timeout=TIMEOUT)
        async with server, client:
            publication = server.publish(self.blocks)
            computing = asyncio.create_task(self._compute(publication))
            pulls = self.draw.choice([0, 1, 1, 1, 2])
            for _ in range(pulls):
                if not await self._pull(client, publication.handle):
                    break
            await computing
            async with asyncio.timeout(2 * LEASE + 2 * TIMEOUT):
                reason = await publication.released()
            assert server.num_published == 0
            if self.late is not None:
                self.source[:] = 1  # somebody else's now
                await asyncio.sleep(5 * TIMEOUT)
                assert np.array_equal(self.target, self.late), "late data was accepted"
        assert server.num_connections == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks outlived the transfer"
        return reason

    async def _compute(self, publication: Publication) -> None:
        """A prompt's blocks, chunk by chunk; sometimes the source gives up in the middle."""
        done = 0
        fails_after = self.draw.randrange(self.blocks) if self.source_fails else None
        while done < self.blocks:
            await asyncio.sleep(self.draw.choice([0.0, 0.01, 0.5, 3.0]))
            if fails_after is not None and done >= fails_after:
                publication.fail("out of luck")
                return
            count = min(self.blocks - done, self.draw.randrange(1, 20))
            publication.ready(range(done, done + count))
            done += count
        publication.finish(TOKEN, False)

    async def _pull(self, client: PullClient, handle: KvHandle) -> bool:
        """Whether another pull may be tried."""
        patience = self.draw.uniform(0, 8) if self.draw.random() < 0.25 else None
        pulling = asyncio.create_task(client.pull(handle, range(self.blocks)))
        good, again = 0, False
        await asyncio.wait([pulling], timeout=patience)
        if not pulling.done():
            pulling.cancel()
        try:
            result = await within(30, pulling)
            assert (result.first_token, result.blocks) == (TOKEN, self.blocks)
            good, end = self.blocks, "pulled"
        except TransferFailed as failure:
            good, end, again = failure.blocks_received, str(failure.reason), True
        except asyncio.CancelledError:
            end = "cancelled"
        size = good * LAYOUT.block_bytes
        assert np.array_equal(self.target[:size], self.source[:size]), "a wrong block"
        self.late = self.target.copy()
        self.ends.append(end)
        return again


async def within(seconds: float, pulling: Awaitable[T]) -> T:
    """AssertionError if it takes longer: whatever happens, a pull ends."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await pulling
    except TimeoutError:
        assert not limit.expired(), "a pull without an end"
        raise


def test_every_transfer_ends_well_or_with_its_reason_and_leaves_nothing_behind() -> None:
    ends: Counter[str] = Counter()
    releases: Counter[ReleaseReason] = Counter()
    for seed in range(SEEDS):
        transfer = Transfer(seed)
        try:
            releases[simulate(transfer.run())] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, pulls {transfer.ends}")
            raise
        ends.update(transfer.ends)
    print(f"pulls {dict(ends)}, releases {dict(releases)}")
    assert {"pulled", "cancelled", "stalled", "peer_lost", "source_failed"} <= set(ends)
    assert {ReleaseReason.PULLED, ReleaseReason.CANCELLED, ReleaseReason.EXPIRED} <= set(releases)


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_is_one_order_of_events(seed: int) -> None:
    one, two = Transfer(seed), Transfer(seed)
    assert simulate(one.run()) == simulate(two.run())
    assert one.ends == two.ends and np.array_equal(one.target, two.target)
