"""A source and a puller in one process, over each transport."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kvtransfer import (
    BlockMemory,
    BlockServer,
    MemoryTransport,
    NullObserver,
    PullClient,
    TcpTransport,
    Transport,
    UcxTransport,
    available_transports,
)
from kvtransfer.faulty import Fault, FaultyTransport
from splitserve.layout import KVLayout

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=16, dtype="float32")  # 16 KiB a block
BLOCKS = 48
FINGERPRINT = b"\x11" * 32

NAMES = ["memory", "tcp", pytest.param("ucx", marks=pytest.mark.skipif(
    "ucx" not in available_transports(), reason="ucxx is not installed"))]  # fmt: skip


@pytest.fixture(params=NAMES)
def transport_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def two_ends(transport_name: str) -> AsyncIterator[tuple[Transport, Transport]]:
    """A transport object for each of two processes, as far as one process can stand for two."""
    makers: dict[str, Callable[[], Transport]] = {
        "memory": MemoryTransport,
        "tcp": TcpTransport,
        "ucx": UcxTransport,
    }
    one = makers[transport_name]()
    two = one if transport_name == "memory" else makers[transport_name]()
    yield one, two
    await two.close()
    await one.close()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks outlived the test"


@dataclass
class Recorder(NullObserver):
    """Counts what the transfers report."""

    received: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)
    expired: int = 0

    def bytes_received(self, transport: str, count: int) -> None:
        self.received += count

    def pull_finished(self, transport: str, seconds: float, exposed_seconds: float) -> None:
        self.finished += 1

    def pull_failed(self, transport: str, reason: str) -> None:
        self.failures.append(reason)

    def lease_expired(self) -> None:
        self.expired += 1


@dataclass
class Pair:
    """Both ends of transfers and their pools."""

    server: BlockServer
    client: PullClient
    source: np.ndarray[Any, Any]  # [blocks, bytes]
    target: np.ndarray[Any, Any]  # [blocks, bytes]
    observer: Recorder
    puller_transport: Transport
    target_memory: BlockMemory


MakePair = Callable[..., contextlib.AbstractAsyncContextManager[Pair]]


@pytest.fixture
def make_pair(
    two_ends: tuple[Transport, Transport],
) -> Callable[..., contextlib.AbstractAsyncContextManager[Pair]]:
    @contextlib.asynccontextmanager
    async def make(
        fault: Fault | None = None,
        fingerprint: bytes = FINGERPRINT,
        client_layout: KVLayout = LAYOUT,
        progress_timeout: float = 10.0,
        **server_options: Any,
    ) -> AsyncIterator[Pair]:
        one, two = two_ends
        server_options = {"hello_seconds": 20.0, **server_options}
        server_transport = one if fault is None else FaultyTransport(one, fault)
        source = np.random.default_rng(7).integers(0, 256, (BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)
        target = np.zeros((BLOCKS, client_layout.block_bytes), dtype=np.uint8)
        recorder = Recorder()
        memory = BlockMemory(target, client_layout, BLOCKS)
        server = BlockServer(
            BlockMemory(source, LAYOUT, BLOCKS), FINGERPRINT, "p0", 3, [server_transport],
            observer=recorder, **server_options,
        )  # fmt: skip
        client = PullClient(
            memory, fingerprint, "d0", 5, [two], progress_timeout=progress_timeout, observer=recorder
        )
        async with server, client:
            yield Pair(server, client, source, target, recorder, two, memory)
        assert server.num_published == 0 and server.num_connections == 0

    return make
