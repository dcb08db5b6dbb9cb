"""Pulls against a real server in the same process, over every transport."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from kvtransfer import BlockMemory, KvHandle, PullClient, Reason, ReleaseReason
from kvtransfer.frames import Frame, Heartbeat
from kvtransfer.pull import Pulling
from splitserve.errors import Incompatible, TransferFailed
from splitserve.layout import KVLayout

from .conftest import BLOCKS, FINGERPRINT, LAYOUT, MakePair, Pair

COUNT = 20


async def pull(pair: Pair, handle: KvHandle, first: int = 0, **options: object) -> object:
    async with asyncio.timeout(30):
        blocks = list(range(BLOCKS - 1, BLOCKS - 1 - (handle.num_blocks - first), -1))
        return await pair.client.pull(handle, blocks, first, **options)  # type: ignore[arg-type]


async def test_a_whole_pull_is_bit_identical_and_every_byte_is_counted(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(COUNT)
        ids = list(range(3, 3 + COUNT))
        publication.ready(ids)
        publication.finish(first_token=1234, finished=True)
        result = await pair.client.pull(publication.handle, list(range(COUNT, 2 * COUNT)))
        assert (result.first_token, result.finished, result.blocks) == (1234, True, COUNT)
        assert result.bytes == pair.observer.received == COUNT * LAYOUT.block_bytes
        assert np.array_equal(pair.target[COUNT : 2 * COUNT], pair.source[ids])
        assert not pair.target[:COUNT].any() and not pair.target[2 * COUNT :].any()
        assert await publication.released() is ReleaseReason.PULLED
        assert pair.observer.finished == 1
        assert pair.client.bytes_per_second > 0, "measured, for the directory"


async def test_blocks_arrive_before_the_computation_ends(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(COUNT)
        progress: asyncio.Queue[int] = asyncio.Queue()
        pulling = asyncio.create_task(
            pair.client.pull(publication.handle, range(COUNT), on_progress=progress.put_nowait)
        )
        for chunk in range(0, COUNT, 5):
            publication.ready(range(chunk, chunk + 5))
            async with asyncio.timeout(30):
                while await progress.get() < chunk + 5:
                    pass
            assert np.array_equal(pair.target[: chunk + 5], pair.source[: chunk + 5])
        assert not pulling.done()
        await asyncio.sleep(0.2)
        publication.finish(7, False)
        result = await pulling
        assert result.first_token == 7
        assert result.exposed_seconds <= result.seconds - 0.2, "only what came behind the computation"
        await publication.released()


@pytest.mark.parametrize("first", [0, 3])
async def test_scattered_blocks_and_runs_find_their_places(make_pair: MakePair, first: int) -> None:
    here = [5, 6, 7, 3, 20, 21, 22, 23, 9, 10, 0, 1]
    there = [8, 9, 10, 11, 30, 31, 40, 41, 2, 3, 4, 6]
    async with make_pair() as pair:
        publication = pair.server.publish(len(there))
        publication.ready(there)
        publication.finish(5, False)
        await pair.client.pull(publication.handle, here[first:], first=first)
        assert np.array_equal(pair.target[here[first:]], pair.source[there[first:]])
        untouched = [i for i in range(BLOCKS) if i not in here[first:]]
        assert not pair.target[untouched].any()
        await publication.released()


async def test_a_computation_that_ended_before_the_pull_is_exposed_as_a_whole(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(2)
        publication.ready([0, 1])
        publication.finish(5, False)
        result = await pair.client.pull(publication.handle, [0, 1])
        assert 0 < result.exposed_seconds <= result.seconds
        await publication.released()


@pytest.mark.parametrize("first", [1, 13, COUNT])
async def test_a_part_that_is_already_there_is_not_pulled(make_pair: MakePair, first: int) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT))
        publication.finish(5, False)
        await pair.client.pull(publication.handle, range(COUNT - first), first=first)
        assert np.array_equal(pair.target[: COUNT - first], pair.source[first:COUNT])
        assert pair.observer.received == (COUNT - first) * LAYOUT.block_bytes
        await publication.released()


async def test_more_blocks_than_the_window_and_many_pulls_at_once(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publications = [pair.server.publish(8) for _ in range(6)]
        pulls = [
            asyncio.create_task(pair.client.pull(p.handle, range(8 * i, 8 * i + 8)))
            for i, p in enumerate(publications)
        ]
        for index, publication in enumerate(publications):
            publication.ready([(index + step) % BLOCKS for step in range(8)])
            publication.finish(index, False)
        assert [result.first_token for result in await asyncio.gather(*pulls)] == list(range(6))
        for index in range(6):
            assert np.array_equal(pair.target[8 * index : 8 * index + 8], pair.source[index : index + 8])
        await asyncio.gather(*(publication.released() for publication in publications))


async def test_a_long_computation_with_heartbeats_is_waited_for(make_pair: MakePair) -> None:
    async with make_pair(progress_timeout=0.5, lease_seconds=0.3) as pair:
        publication = pair.server.publish(2)
        pulling = asyncio.create_task(pair.client.pull(publication.handle, [0, 1]))
        await asyncio.sleep(1.6)
        publication.ready([4, 5])
        publication.finish(1, False)
        assert (await pulling).blocks == 2


async def test_a_heartbeat_that_is_being_sent_when_the_blocks_are_there_is_not_cut_short(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cut = asyncio.Event(), []
    send = Pulling._send

    async def slow(self: Pulling, frame: Frame) -> None:
        if isinstance(frame, Heartbeat):
            begun.set()
            try:
                await asyncio.sleep(0.3)
            except asyncio.CancelledError:
                cut.append(frame)
                raise
        await send(self, frame)

    monkeypatch.setattr(Pulling, "_send", slow)
    async with make_pair(progress_timeout=2.0, lease_seconds=2.0) as pair:
        publication = pair.server.publish(2)
        pulling = asyncio.create_task(pair.client.pull(publication.handle, [0, 1]))
        async with asyncio.timeout(30):
            await begun.wait()
        publication.ready([4, 5])
        publication.finish(1, False)
        assert (await pulling).blocks == 2
        assert not cut


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": bytes(16)}, Reason.REFUSED),
        ({"epoch": 4}, Reason.REFUSED),
        ({"source": "p1"}, Reason.REFUSED),
        ({"transfer_id": bytes(16)}, Reason.EXPIRED),
        ({"addresses": {"pigeon": "127.0.0.1:1"}}, Reason.CONNECT),
        ({"num_blocks": 3}, Reason.PROTOCOL),
    ],
)
async def test_a_wrong_handle_is_refused(make_pair: MakePair, change: dict[str, object], reason: Reason) -> None:
    async with make_pair(progress_timeout=2.0) as pair:
        publication = pair.server.publish(2)
        publication.ready([0, 1])
        handle = dataclasses.replace(publication.handle, **change)  # type: ignore[arg-type]
        with pytest.raises(TransferFailed) as caught:
            await pull(pair, handle)
        assert caught.value.reason == reason and caught.value.blocks_received == 0
        assert not pair.target.any()


async def test_another_fingerprint_is_incompatible_before_and_after_connecting(make_pair: MakePair) -> None:
    async with make_pair(fingerprint=b"\x22" * 32) as pair:
        publication = pair.server.publish(1)
        with pytest.raises(Incompatible, match=r"1111.* of p0 is not 2222"):
            await pull(pair, publication.handle)
        pretending = dataclasses.replace(publication.handle, fingerprint=b"\x22" * 32)
        with pytest.raises(Incompatible, match=r"2222.* of d0 is not 1111.* of p0"):
            await pull(pair, pretending)


async def test_another_block_size_is_incompatible(make_pair: MakePair) -> None:
    async with make_pair(client_layout=KVLayout(4, 2, 16, "bfloat16")) as pair:
        with pytest.raises(Incompatible, match="bytes"):
            await pull(pair, pair.server.publish(1).handle)


def flipping(times: int) -> tuple[list[int], object]:
    """A fault that flips a bit of block 6 so many times, and the slots that it damaged."""
    damaged: list[int] = []

    def fault(slot: int, data: memoryview) -> memoryview:
        if slot & 0xFFFFF != 6 or len(damaged) >= times:
            return data
        damaged.append(slot)
        copy = bytearray(data)
        copy[len(copy) // 2] ^= 1
        return memoryview(copy)

    return damaged, fault


async def test_a_damaged_block_is_fetched_again(make_pair: MakePair) -> None:
    damaged, fault = flipping(1)
    async with make_pair(fault=fault) as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT))
        publication.finish(9, False)
        steps: list[int] = []
        assert (await pair.client.pull(publication.handle, range(COUNT), on_progress=steps.append)).blocks == COUNT
        assert len(damaged) == 1 and np.array_equal(pair.target[:COUNT], pair.source[:COUNT])
        assert steps == sorted(set(steps)) and steps[-1] == COUNT
        assert pair.observer.received == COUNT * LAYOUT.block_bytes


async def test_a_block_damaged_twice_fails_the_pull_and_leaves_the_transfer(make_pair: MakePair) -> None:
    damaged, fault = flipping(2)
    async with make_pair(fault=fault) as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT))
        publication.finish(9, False)
        with pytest.raises(TransferFailed) as caught:
            await pull(pair, publication.handle)
        assert (caught.value.reason, caught.value.blocks_received) == (Reason.CHECKSUM, 6)
        await pull(pair, publication.handle, first=6)  # the lease holds: a second attempt fetches the rest
        assert len(damaged) == 2 and await publication.released() is ReleaseReason.PULLED


@pytest.mark.parametrize("kind", ["lost", "cut short", "drawn out"])
async def test_a_payload_that_does_not_come_whole_fails_the_pull(make_pair: MakePair, kind: str) -> None:
    def fault(slot: int, data: memoryview) -> memoryview | None:
        if slot & 0xFFFFF != 3:
            return data
        return {"lost": None, "cut short": data[:-8], "drawn out": memoryview(bytes(data) + b"x")}[kind]

    async with make_pair(fault=fault, progress_timeout=1.0, lease_seconds=0.3) as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT))  # and not finished: the lease does not run out before the pull
        with pytest.raises(TransferFailed) as caught:
            await pull(pair, publication.handle)
        allowed = {Reason.STALLED, Reason.PROTOCOL, Reason.CHECKSUM, Reason.PEER_LOST}
        assert caught.value.reason in allowed and caught.value.blocks_received <= 3
        publication.finish(9, False)
        assert await publication.released() is ReleaseReason.EXPIRED


async def test_the_source_failing_reaches_the_puller_with_its_message(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(COUNT)
        pulling = asyncio.create_task(pull(pair, publication.handle))
        publication.ready([1, 2])
        while not pair.observer.received:
            await asyncio.sleep(0.005)
        publication.fail("out of blocks")
        with pytest.raises(TransferFailed, match="out of blocks") as caught:
            await pulling
        assert caught.value.reason == Reason.SOURCE_FAILED and caught.value.blocks_received == 2
        assert await publication.released() is ReleaseReason.FAILED


async def test_the_server_closing_fails_the_pull_at_once(make_pair: MakePair) -> None:
    async with make_pair(progress_timeout=5.0) as pair:
        publication = pair.server.publish(COUNT)
        pulling = asyncio.create_task(pull(pair, publication.handle))
        publication.ready([1, 2])
        while not pair.observer.received:
            await asyncio.sleep(0.005)
        await pair.server.close()
        with pytest.raises(TransferFailed) as caught:
            await pulling
        assert caught.value.reason == Reason.PEER_LOST
        assert await publication.released() is ReleaseReason.CLOSED


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05])
async def test_after_a_cancel_the_blocks_never_change(make_pair: MakePair, delay: float) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT - 1))
        pulling = asyncio.create_task(pair.client.pull(publication.handle, range(COUNT)))
        await asyncio.sleep(delay)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        pair.target[:] = 0xAB
        if pair.observer.received:
            assert await publication.released() is ReleaseReason.CANCELLED
        else:
            publication.fail("given up before the source heard of it: only the lease would end it")
        await asyncio.sleep(0.05)
        assert (pair.target == 0xAB).all() and pair.observer.failures in (["cancelled"], [])


@pytest.mark.parametrize("transport_name", ["memory"])
async def test_a_cancelled_pull_is_let_go_by_the_source_wherever_it_was(make_pair: MakePair) -> None:
    """In memory all is done by the loop: so many of its rounds reach every await from HELLO to the last one."""
    async with make_pair(progress_timeout=10.0) as pair:
        received = set()
        for rounds in range(2, 60):  # the second one begins the pull's own task, which connects at once
            publication = pair.server.publish(2)
            publication.ready([0])
            before = pair.observer.received
            pulling = asyncio.create_task(pair.client.pull(publication.handle, range(2)))
            for _ in range(rounds):
                await asyncio.sleep(0)
            pulling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pulling
            async with asyncio.timeout(30):
                assert await publication.released() is ReleaseReason.CANCELLED, f"after {rounds} rounds"
            received.add(pair.observer.received - before)
        assert received == {0, LAYOUT.block_bytes}, "cancelled before and behind the first block"


async def test_closing_the_client_ends_its_pulls_and_leaves_the_transfer_to_others(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        publication = pair.server.publish(COUNT)
        publication.ready(range(COUNT))
        pulling = asyncio.create_task(pair.client.pull(publication.handle, range(COUNT)))
        while not pair.observer.received:
            await asyncio.sleep(0.001)
        await pair.client.close()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        publication.finish(3, False)
        other = PullClient(pair.target_memory, FINGERPRINT, "d1", 1, [pair.puller_transport])
        assert (await other.pull(publication.handle, range(COUNT))).first_token == 3
        await other.close()


@pytest.mark.parametrize(("index", "offset", "length"), [(-1, 0, 1), (4, 0, 1), (0, -1, 1), (0, 1, 16384)])
def test_a_pool_gives_nothing_outside_its_blocks(index: int, offset: int, length: int) -> None:
    memory = BlockMemory(bytearray(4 * LAYOUT.block_bytes), LAYOUT, 4)
    with pytest.raises(IndexError):
        memory.range(index, 1, offset, length)


def test_a_pool_of_another_size_or_read_only_is_refused() -> None:
    with pytest.raises(ValueError, match="not 4 blocks"):
        BlockMemory(bytearray(100), LAYOUT, 4)
    with pytest.raises(ValueError, match="writable"):
        BlockMemory(bytes(4 * LAYOUT.block_bytes), LAYOUT, 4)
