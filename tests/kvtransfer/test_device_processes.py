"""What serves a GPU, joined: the pool, its Triton kernels, `DeviceBlocks`, real transports, two processes.

On a GPU, where there is one. Else the pools are in host memory, and a UCX that is told to carry them sends from
them and receives into them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections.abc import Sequence

import pytest
import torch

from bench.transfer import FINGERPRINT, handle_from_json
from engine.device_pool import TensorPool
from kvtransfer import DeviceBlocks, PullClient, PullResult, Reason, available_transports
from splitserve.errors import TransferFailed
from tests.kvtransfer.device_source import BLOCKS, DEVICE, TOKEN, TRANSPORTS, source_tensor

SENT = random.Random(3).sample(range(BLOCKS), 8) + list(range(12, 24))
RECEIVED = list(range(5, 17)) + random.Random(4).sample(range(20, BLOCKS), 8)
WAYS = {
    "tcp": "into device memory by way of pinned host memory",
    "ucx": "into device memory from" if DEVICE == "cuda" else "into device memory by way of pinned host memory",
    "carrying": "into device memory from",
}


@pytest.fixture(params=[name for name in WAYS if name == "tcp" or "ucx" in available_transports()])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class DamagedPool(TensorPool):
    """Loses a bit of what has arrived, as often as it is told to."""

    def __init__(self, kv: torch.Tensor, times: int) -> None:
        super().__init__(kv)
        self._kv, self.times = kv, times

    def checksums(self, blocks: Sequence[int], offset: int, length: int) -> list[int]:
        if RECEIVED[2] in blocks and self.times:
            self.times -= 1
            self._kv[RECEIVED[2], 77] ^= 1 << 30
            if self._kv.is_cuda:
                torch.cuda.synchronize(self._kv.device)
        return super().checksums(blocks, offset, length)


def empty() -> torch.Tensor:
    return torch.zeros_like(source_tensor(), device=DEVICE)


async def pull(name: str, pool: TensorPool) -> tuple[PullResult, str]:
    """The result, and why the source let go of the blocks."""
    command = [sys.executable, "-m", "tests.kvtransfer.device_source", name, *map(str, SENT)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    transport = TRANSPORTS[name]()
    try:
        assert process.stdout is not None
        async with (
            asyncio.timeout(60),
            PullClient(DeviceBlocks(pool), FINGERPRINT, "puller", 2, [transport]) as client,
        ):
            handle = handle_from_json(await process.stdout.readline())
            result = await client.pull(handle, RECEIVED)
            return result, (await process.stdout.readline()).decode().strip()
    finally:
        await transport.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_blocks_arrive_bit_identical_and_nothing_else_changes(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    kv = empty()
    with caplog.at_level(logging.INFO):
        result, reason = await pull(name, TensorPool(kv))
    expected = torch.zeros_like(source_tensor())
    expected[RECEIVED] = source_tensor()[SENT]
    assert torch.equal(kv.cpu(), expected)
    assert (result.first_token, result.blocks, reason) == (TOKEN, len(SENT), "pulled")
    assert any(WAYS[name] in message for message in caplog.messages)


async def test_a_damaged_block_is_noticed_and_fetched_again(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kv = empty()
    await pull(name, pool := DamagedPool(kv, times=1))
    assert pool.times == 0 and "block 2 was damaged on its way" in caplog.text
    assert torch.equal(kv.cpu()[RECEIVED], source_tensor()[SENT])


async def test_a_block_damaged_twice_ends_the_pull(name: str) -> None:
    with pytest.raises(TransferFailed, match="damaged twice") as caught:
        await pull(name, DamagedPool(empty(), times=2))
    assert caught.value.reason == Reason.CHECKSUM and caught.value.blocks_received <= 2
