"""Pulls between two real processes, and what the loss of the source looks like from the other one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from bench.transfer import BLOCKS, FINGERPRINT, LAYOUT, Source, source_pool
from kvtransfer import BlockMemory, PullClient, Reason, available_transports, make_transports
from splitserve.errors import TransferFailed

PATIENT, HASTY = 30.0, 1.0  # seconds without progress that a pull takes


@pytest.fixture(params=available_transports())
def transport_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def source(transport_name: str) -> AsyncIterator[Source]:
    async with Source(transport_name) as source:
        yield source


@pytest.fixture
def pool() -> np.ndarray:
    return np.zeros((BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)


@pytest.fixture
def patience() -> float:
    return PATIENT


@pytest.fixture
async def client(transport_name: str, pool: np.ndarray, patience: float) -> AsyncIterator[PullClient]:
    transports = make_transports([transport_name])
    memory = BlockMemory(pool, LAYOUT, BLOCKS)
    async with PullClient(memory, FINGERPRINT, "puller", 1, transports, progress_timeout=patience) as client:
        yield client
    await transports[0].close()


async def test_blocks_arrive_bit_identical(source: Source, client: PullClient, pool: np.ndarray) -> None:
    for _ in range(3):
        pool[:] = 0
        result = await client.pull(await source.publish(str(BLOCKS)), range(BLOCKS))
        assert result.bytes == BLOCKS * LAYOUT.block_bytes and np.array_equal(pool, source_pool())
    print(f"{result.transport}: {result.bytes / result.seconds / 1e9:.2f} GB/s")


@pytest.mark.parametrize(
    ("signum", "reasons", "patience"),
    [(signal.SIGKILL, {Reason.PEER_LOST}, PATIENT), (signal.SIGSTOP, {Reason.STALLED}, HASTY)],
)
async def test_a_source_that_dies_or_stops_is_noticed_and_writes_no_more(
    source: Source, client: PullClient, pool: np.ndarray, signum: signal.Signals, reasons: set[Reason]
) -> None:
    half = asyncio.Event()
    handle = await source.publish(f"half {BLOCKS}")
    pulling = asyncio.create_task(
        client.pull(handle, range(BLOCKS), on_progress=lambda n: half.set() if n == BLOCKS // 2 else None)
    )
    await asyncio.wait_for(half.wait(), 30)
    os.kill(source.process.pid, signum)
    start = time.monotonic()
    with pytest.raises(TransferFailed) as caught:
        await pulling
    assert caught.value.reason in reasons and caught.value.blocks_received == BLOCKS // 2
    assert time.monotonic() - start < 15, "long before a patient one would have noticed that nothing comes"
    pool[:] = 9
    if signum is signal.SIGSTOP:
        os.kill(source.process.pid, signal.SIGCONT)
    await asyncio.sleep(0.1)
    assert (pool == 9).all()


@pytest.mark.parametrize("patience", [HASTY])
async def test_a_source_stopped_while_bytes_flow_writes_nothing_when_it_wakes(
    source: Source, client: PullClient, pool: np.ndarray
) -> None:
    some = asyncio.Event()
    handle = await source.publish(str(BLOCKS))
    pulling = asyncio.create_task(client.pull(handle, range(BLOCKS), on_progress=lambda _: some.set()))
    await asyncio.wait_for(some.wait(), 30)
    os.kill(source.process.pid, signal.SIGSTOP)
    try:
        await asyncio.gather(pulling, return_exceptions=True)
        pool[:] = 9
    finally:
        os.kill(source.process.pid, signal.SIGCONT)
    await asyncio.sleep(0.2)
    assert (pool == 9).all()


async def test_a_source_that_is_gone_cannot_be_connected_to(source: Source, client: PullClient) -> None:
    handle = await source.publish("1")
    source.process.kill()
    await source.process.wait()
    with pytest.raises(TransferFailed) as caught:
        await client.pull(handle, [0])
    assert caught.value.reason == Reason.CONNECT


async def test_a_hundred_pulls_leave_nothing_behind(source: Source, client: PullClient) -> None:
    async def round_of(count: int) -> None:
        for turn in range(count):
            handle = await source.publish("2")
            if turn % 3:
                await client.pull(handle, [0, 1])
            else:
                pulling = asyncio.create_task(client.pull(handle, [0, 1]))
                await asyncio.sleep(0.002 * (turn % 4))
                pulling.cancel()
                await asyncio.gather(pulling, return_exceptions=True)

    def descriptors() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in ("self", source.process.pid)]

    await round_of(20)
    await asyncio.sleep(0.1)
    before = descriptors()
    await round_of(100)
    async with asyncio.timeout(30):
        while any(after > old + 8 for after, old in zip(descriptors(), before, strict=True)):
            await asyncio.sleep(0.05)
        while len(asyncio.all_tasks()) > 3:
            await asyncio.sleep(0.05)
