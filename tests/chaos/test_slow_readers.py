"""Clients that read their answers slower than these are generated, or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from statistics import median

import pytest
import pytest_asyncio

from splitserve.config import RouterConfig
from splitserve.grpc_server import open_channel
from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import MODEL, Case, ask
from tests.chaos.test_overload import LONG

pytestmark = pytest.mark.asyncio(loop_scope="session")

READERS = 50
READER_TIMEOUT = 30.0 if LONG else 2.0
CASE = Case(0, tuple(range(40)), 60)
LONG_ANSWER = 1500  # tokens, of about 600 bytes each


@pytest_asyncio.fixture(loop_scope="session")
async def patient(cluster: ChaosCluster) -> AsyncIterator[ChaosCluster]:
    """With a second router, which has its own patience with readers."""
    shared = cluster.children["router"].config
    assert isinstance(shared, RouterConfig)
    await cluster.start("patient", replace(shared, port=0, grpc_port=0, reader_timeout=READER_TIMEOUT))
    yield cluster
    assert await cluster.children.pop("patient").stop() == 0


class SlowReader:
    """Asks for a long answer over a connection that takes next to nothing."""

    def __init__(self, cluster: ChaosCluster) -> None:
        host, _, port = cluster.children["patient"].addresses["http"].removeprefix("http://").rpartition(":")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((host, int(port)))
        self._socket.setblocking(False)
        body = {"model": MODEL, "prompt": list(range(40)), "max_tokens": LONG_ANSWER, "ignore_eos": True}
        body |= {"stream": True, "logprobs": 5, "temperature": 0}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        self._socket.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + data)

    def read(self) -> bool:
        """One byte, if there is one; False once the connection is gone."""
        try:
            return bool(self._socket.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()


async def inter_token(cluster: ChaosCluster) -> float:
    """Median seconds a token of single answers."""
    seconds = []
    async with cluster.channel() as channel:
        for _ in range(20):
            began = asyncio.get_running_loop().time()
            answer = await ask(channel, CASE)
            assert answer.error is None
            seconds.append((asyncio.get_running_loop().time() - began - answer.first) / (CASE.new - 1))
    return median(seconds)


async def generating(cluster: ChaosCluster) -> float:
    """Requests that the decode workers run."""
    return sum([await cluster.metric(f"decode-{i}", "splitserve_num_requests_running") for i in range(2)])


async def beside_fast(cluster: ChaosCluster) -> float:
    """The same beside as many answers of the same length that are read."""
    long = Case(0, CASE.prompt, LONG_ANSWER)
    async with open_channel(cluster.children["patient"].addresses["grpc"]) as channel:
        others = [asyncio.create_task(ask(channel, long)) for _ in range(READERS)]
        try:
            while await generating(cluster) < READERS:
                await asyncio.sleep(0.05)
            return await inter_token(cluster)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await cluster.idle()


async def test_readers_that_stall_are_cut_off_and_cost_the_router_little(patient: ChaosCluster) -> None:
    memory = await patient.metric("patient", "process_resident_memory_bytes")
    before, fast = (await inter_token(patient), await beside_fast(patient)) if LONG else (0.0, 0.0)
    readers = [SlowReader(patient) for _ in range(READERS)]
    most = memory
    try:
        async with asyncio.timeout(120):
            while await generating(patient) < READERS:
                await asyncio.sleep(0.05)
            if LONG:
                await patient.idle(25)  # what they asked for has been generated
                beside = await inter_token(patient)
            while await patient.metric("patient", "splitserve_router_requests_running"):
                await asyncio.sleep(1)
                for reader in readers:
                    reader.read()
                most = max(most, await patient.metric("patient", "process_resident_memory_bytes"))
        await patient.idle()
    finally:
        for reader in readers:
            reader.close()
    if LONG:
        after = await inter_token(patient)
        print(
            f"a token in {1e3 * before:.2f} ms alone, {1e3 * fast:.2f} ms beside {READERS} who read, "
            f"{1e3 * beside:.2f} ms beside {READERS} who do not, {1e3 * after:.2f} ms alone again"
        )
        assert beside < 1.5 * max(before, after)
    print(f"{READERS} readers: {(most - memory) / 2**20:.1f} MiB more in the router")
    assert most - memory < READERS * 2**20
