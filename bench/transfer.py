"""How fast KV blocks move between two processes, beside a plain copy: ``python -m bench.transfer``.

One process publishes, this one pulls: handshake, checksums and all. Beside it the same bytes over one connection
of the same transport with nothing around them, and what the checksums take alone. Medians of several rounds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np
import uvloop

from kvtransfer import BlockMemory, BlockServer, KvHandle, PullClient, available_transports, make_transports
from kvtransfer.checksums import Checksum, checksum_of
from kvtransfer.faults import ConnectionLost
from kvtransfer.transport import Connection
from splitserve.layout import KVLayout

LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")  # 368,640 bytes a block
BLOCKS = 64
PIECE = 8  # blocks of one payload where only the transport is measured
ROUNDS = 15
FINGERPRINT = LAYOUT.fingerprint("bench")
SOURCE_ID = "source"


def handle_to_json(handle: KvHandle) -> str:
    return json.dumps(
        {
            "transfer_id": base64.b64encode(handle.transfer_id).decode(),
            "secret": base64.b64encode(handle.secret).decode(),
            "addresses": dict(handle.addresses),
            "num_blocks": handle.num_blocks,
        }
    )


def handle_from_json(line: bytes) -> KvHandle:
    fields = json.loads(line)
    return KvHandle(
        transfer_id=base64.b64decode(fields["transfer_id"]),
        secret=base64.b64decode(fields["secret"]),
        addresses=fields["addresses"],
        source=SOURCE_ID,
        epoch=1,
        fingerprint=FINGERPRINT,
        num_blocks=fields["num_blocks"],
    )


def source_pool() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``[blocks, bytes]``, the same in every process."""
    return np.random.default_rng(1).integers(0, 256, (BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)


async def serve(transport: str) -> None:
    """For each line on stdin, the number of blocks: publishes so many, all ready. For ``half N``: only the first
    half of ``N`` is ever ready. Answers with a line that holds the handle. For ``bare``: with an address, whose
    connections get the pool for every frame they send. Ends with stdin."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    transports = make_transports([transport])
    memory = BlockMemory(source_pool(), LAYOUT, BLOCKS)
    bare: set[asyncio.Task[None]] = set()
    async with BlockServer(memory, FINGERPRINT, SOURCE_ID, 1, transports) as server:
        while line := await commands.readline():
            if line == b"bare\n":
                listener = await transports[0].listen("127.0.0.1", lambda c: bare.add(loop.create_task(_pour(c))))
                print(listener.address, flush=True)
                continue
            *half, count = line.split()
            publication = server.publish(int(count))
            publication.ready(range(int(count) // 2 if half else int(count)))
            if not half:
                publication.finish(42, False)
            print(handle_to_json(publication.handle), flush=True)
    if bare:
        await asyncio.gather(*bare)
        await listener.close()
    await transports[0].close()


async def _pour(connection: Connection) -> None:
    """The pool, for each frame, until the peer has gone."""
    pieces = _pieces(source_pool())
    with suppress(ConnectionLost):
        while True:
            await connection.recv_frame()
            await asyncio.gather(*(connection.send_payload(slot, piece) for slot, piece in enumerate(pieces)))
    await connection.close()


def _pieces(pool: np.ndarray[Any, np.dtype[np.uint8]]) -> list[memoryview]:
    return [memoryview(pool[i : i + PIECE].data).cast("B") for i in range(0, BLOCKS, PIECE)]


class Source:
    """The publishing process; ``async with`` ends it."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Source:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.transfer", "--serve", self._transport,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return self

    async def publish(self, command: str) -> KvHandle:
        return handle_from_json(await self.ask(command))

    async def ask(self, command: str) -> bytes:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{command}\n".encode())
        return await asyncio.wait_for(self.process.stdout.readline(), 20)

    async def __aexit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 5)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def measure(transport: str) -> tuple[list[float], list[float]]:
    """Seconds of pulls of all blocks, and of pulls of one block."""
    pool = np.zeros((BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)
    transports = make_transports([transport])
    whole, single = [], []
    async with (
        Source(transport) as source,
        PullClient(BlockMemory(pool, LAYOUT, BLOCKS), FINGERPRINT, "puller", 1, transports) as client,
    ):
        for _ in range(ROUNDS + 1):
            whole.append((await client.pull(await source.publish(str(BLOCKS)), range(BLOCKS))).seconds)
            single.append((await client.pull(await source.publish("1"), range(1))).seconds)
        assert np.array_equal(pool, source_pool())
    await transports[0].close()
    return whole, single  # the first of each includes the start of the transport


async def measure_bare(transport: str) -> float:
    """Median time of the same bytes without handshake, announcements and checksums."""
    pool = np.zeros((BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)
    transports = make_transports([transport])
    times = []
    async with Source(transport) as source:
        connection = await transports[0].connect((await source.ask("bare")).decode().strip())
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            posted = [connection.post_payload(slot, piece) for slot, piece in enumerate(_pieces(pool))]
            await connection.send_frame(b"go")
            await asyncio.gather(*posted)
            times.append(time.perf_counter() - start)
        await connection.close()
        assert np.array_equal(pool, source_pool())
    await transports[0].close()
    return statistics.median(times[1:])


def checksum_seconds() -> float:
    """Median time of one side's checksums of all blocks."""
    pool, times = source_pool(), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for block in pool:
            checksum_of(Checksum.CRC32C, memoryview(block))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_seconds() -> float:
    """Median time of a copy of the same bytes inside this process."""
    source, target, times = source_pool(), source_pool(), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report() -> None:
    size = BLOCKS * LAYOUT.block_bytes
    print(f"{BLOCKS} blocks of {LAYOUT.block_bytes:,} bytes, median of {ROUNDS}")
    print(f"copy in memory   {size / copy_seconds() / 1e9:6.2f} GB/s")
    print(f"checksums        {size / checksum_seconds() / 1e9:6.2f} GB/s, on either side")
    for transport in available_transports():
        whole, single = uvloop.run(measure(transport))
        print(
            f"{transport:<16} {size / statistics.median(whole[1:]) / 1e9:6.2f} GB/s"
            f"   (slowest {size / max(whole[1:]) / 1e9:.2f}, first {size / whole[0] / 1e9:.2f})"
            f"   one block {statistics.median(single[1:]) * 1e3:.2f} ms"
        )
        bare = uvloop.run(measure_bare(transport))
        print(f"{transport + ' alone':<16} {size / bare / 1e9:6.2f} GB/s")


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        uvloop.run(serve(sys.argv[2]))  # as the services do
    else:
        report()


if __name__ == "__main__":
    main()
