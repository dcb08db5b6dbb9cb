"""Transfers whose frames and payloads are damaged, lost, doubled, overtaken or replayed: nothing wrong passes.

Seeded and in one process, so that a thousand of them take seconds. The source's side breaks; what a failed pull
did not bring, the engine computes again. What is called good must be good, and nothing may stay held.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvtransfer import BlockMemory, BlockServer, MemoryTransport, PullClient, Reason, ReleaseReason
from kvtransfer.faulty import FaultyTransport
from splitserve.errors import TransferFailed
from splitserve.layout import KVLayout
from tests.chaos.cluster import SECONDS

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32")  # 512 bytes a block
BLOCKS = 12
FINGERPRINT = b"\x22" * 32
ROUNDS = 1000 if SECONDS else 300
AT_A_TIME = 100  # more at once, and the deadlines of all would pass while they wait for the processor
TOKEN = 77_777


@dataclass
class Faults:
    """Breaks about one frame or payload in ``rarity``, in a way drawn from ``draw``; counts what it did."""

    draw: random.Random
    rarity: int
    replayed: list[bytes]  # frames of earlier transfers, shared by all rounds
    done: Counter[str] = field(default_factory=Counter)
    held: bytes | None = None  # a frame that waits to be overtaken

    def payload(self, slot: int, data: memoryview) -> memoryview | None:
        kind = self._choose("flip", "cut", "longer", "lost", "foreign")
        match kind:
            case "flip":
                return memoryview(self._flipped(bytes(data)))
            case "cut":
                return data[: self.draw.randrange(1, len(data))]
            case "longer":
                return memoryview(bytes(data) + b"x")
            case "lost":
                return None
            case "foreign":
                return memoryview(self.draw.randbytes(len(data)))
        return data

    def frame(self, frame: bytes) -> Sequence[bytes]:
        earlier, self.held = ([self.held] if self.held else []), None
        self.replayed.append(frame)
        match self._choose("flipped frame", "cut frame", "lost frame", "doubled", "overtaken", "replayed"):
            case "flipped frame":
                return [self._flipped(frame), *earlier]
            case "cut frame":
                return [frame[: self.draw.randrange(1, len(frame))], *earlier]
            case "lost frame":
                return earlier
            case "doubled":
                return [frame, frame, *earlier]
            case "overtaken":
                self.held = frame
                return earlier
            case "replayed":
                return [self.draw.choice(self.replayed), frame, *earlier]
        return [frame, *earlier]

    def _choose(self, *kinds: str) -> str:
        kind = self.draw.choice(kinds) if self.draw.randrange(self.rarity) == 0 else ""
        self.done[kind] += 1
        return kind

    def _flipped(self, data: bytes) -> bytes:
        flipped = bytearray(data)
        flipped[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        return bytes(flipped)


@dataclass(frozen=True, slots=True)
class Outcome:
    reason: Reason | None  # None: the pull ended well
    faults: Counter[str]


async def one_transfer(seed: int, replayed: list[bytes]) -> Outcome:
    """One pull through a connection that breaks things. Asserts all that must hold whatever happens."""
    draw = random.Random(seed)
    faults = Faults(draw, rarity=draw.choice([8, 20, 60]), replayed=replayed)
    inner = MemoryTransport()
    source = np.frombuffer(draw.randbytes(BLOCKS * LAYOUT.block_bytes), dtype=np.uint8).copy()
    target = np.zeros_like(source)
    server = BlockServer(
        BlockMemory(source, LAYOUT, BLOCKS), FINGERPRINT, "p0", 3,
        [FaultyTransport(inner, faults.payload, faults.frame)], lease_seconds=0.6, hello_seconds=0.3,
    )  # fmt: skip
    client = PullClient(BlockMemory(target, LAYOUT, BLOCKS), FINGERPRINT, "d0", 5, [inner], progress_timeout=0.3)
    reason, good = None, BLOCKS
    async with asyncio.timeout(20), server, client:
        publication = server.publish(BLOCKS)
        computing = asyncio.create_task(compute(publication.ready, publication.finish, draw))
        try:
            result = await client.pull(publication.handle, range(BLOCKS))
            assert (result.first_token, result.finished) == (TOKEN, False), "a wrong token"
        except TransferFailed as failure:
            reason, good = Reason(failure.reason), failure.blocks_received
        await computing
        size = good * LAYOUT.block_bytes
        assert np.array_equal(target[:size], source[:size]), "a wrong block"
        quiet = target.copy()
        released = await publication.released()  # by the puller, or by the lease: never held for good
        assert released in (ReleaseReason.PULLED, ReleaseReason.EXPIRED, ReleaseReason.CANCELLED)
        assert server.num_published == 0
        source[:] = 0  # the blocks belong to somebody else now
        await asyncio.sleep(0)
        assert np.array_equal(target, quiet), "late data was accepted"
    assert server.num_connections == 0
    return Outcome(reason, faults.done)


async def compute(
    ready: Callable[[Sequence[int]], None], finish: Callable[[int, bool], None], draw: random.Random
) -> None:
    """Blocks become ready in chunks, as those of a prompt do."""
    done = 0
    while done < BLOCKS:
        count = min(BLOCKS - done, draw.randrange(1, 6))
        ready(range(done, done + count))
        done += count
        await asyncio.sleep(0)
    finish(TOKEN, False)


async def test_no_wrong_block_and_no_wrong_token_in_broken_transfers() -> None:
    faults: Counter[str] = Counter()
    ends: Counter[Reason | None] = Counter()
    replayed: list[bytes] = []
    for start in range(0, ROUNDS, AT_A_TIME):
        rounds = (one_transfer(seed, replayed) for seed in range(start, start + AT_A_TIME))
        for outcome in await asyncio.gather(*rounds):
            faults += outcome.faults
            ends[outcome.reason] += 1
    print(f"\nfaults {dict(faults)}, ends {dict(ends)}")
    assert min(faults.values()) > ROUNDS // 60, "each kind of fault has happened"
    assert ends[None] > ROUNDS // 10, "some got through"
    assert {Reason.PROTOCOL, Reason.STALLED} <= set(ends)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": bytes(16)}, Reason.REFUSED),
        ({"epoch": 4}, Reason.REFUSED),
        ({"source": "p1"}, Reason.REFUSED),
        ({"transfer_id": bytes(16)}, Reason.EXPIRED),
    ],
)
async def test_a_foreign_handle_gets_no_byte(change: dict[str, object], reason: Reason) -> None:
    transport = MemoryTransport()
    source = np.ones(BLOCKS * LAYOUT.block_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    memory = BlockMemory(target, LAYOUT, BLOCKS)
    async with (
        BlockServer(BlockMemory(source, LAYOUT, BLOCKS), FINGERPRINT, "p0", 3, [transport]) as server,
        PullClient(memory, FINGERPRINT, "d0", 5, [transport]) as client,
    ):
        publication = server.publish(BLOCKS)
        publication.ready(range(BLOCKS))
        publication.finish(TOKEN, False)
        with pytest.raises(TransferFailed) as caught:
            await client.pull(replace(publication.handle, **change), range(BLOCKS))
        assert caught.value.reason is reason and not target.any()
        await client.pull(publication.handle, range(BLOCKS))  # its owner is not disturbed
        assert target.all()


async def test_a_source_that_came_back_as_another_incarnation_refuses_the_kept_connection() -> None:
    """The old connection is kept by the puller; the new incarnation has the same address and other contents."""
    transport = MemoryTransport()
    source = np.ones(BLOCKS * LAYOUT.block_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    async with PullClient(BlockMemory(target, LAYOUT, BLOCKS), FINGERPRINT, "d0", 5, [transport]) as client:
        async with BlockServer(BlockMemory(source, LAYOUT, BLOCKS), FINGERPRINT, "p0", 3, [transport]) as old:
            publication = old.publish(BLOCKS)
            publication.ready(range(BLOCKS))
            publication.finish(TOKEN, False)
            await client.pull(publication.handle, range(BLOCKS))
            stale = old.publish(BLOCKS).handle
        source[:], target[:] = 2, 0
        async with BlockServer(BlockMemory(source, LAYOUT, BLOCKS), FINGERPRINT, "p0", 4, [transport]) as new:
            stale = replace(stale, addresses=dict(new.addresses))
            with pytest.raises(TransferFailed) as caught:
                await client.pull(stale, range(BLOCKS))
            assert caught.value.reason is Reason.REFUSED and not target.any()
            publication = new.publish(BLOCKS)
            publication.ready(range(BLOCKS))
            publication.finish(TOKEN, True)
            assert (await client.pull(publication.handle, range(BLOCKS))).finished
            assert (target == 2).all()
