from __future__ import annotations

import asyncio

import httpx
import pytest

from splitserve.errors import ConfigError
from splitserve.metrics import EngineMetrics, new_registry
from splitserve.metrics_server import MetricsServer


async def test_it_serves_the_metrics() -> None:
    registry = new_registry()
    EngineMetrics(registry, "m", "decode").follow_load(lambda: (3, 0, 0.5))
    async with MetricsServer(registry, list) as server, httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'splitserve_num_requests_running{model_name="m",role="decode"} 3.0' in answer.text


async def test_readiness_follows_the_reasons() -> None:
    reasons = ["warming up", "no directory"]
    async with (
        MetricsServer(new_registry(), lambda: reasons) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        assert (await client.get("/live")).status_code == 200
        answer = await client.get("/ready")
        assert (answer.status_code, answer.text) == (503, "warming up\nno directory\n")
        reasons.clear()
        assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("POST", "/metrics", 405), ("HEAD", "/live", 200)]
)
async def test_nothing_else_is_served(method: str, path: str, status: int) -> None:
    async with MetricsServer(new_registry(), list) as server, httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.request(method, path)).status_code == status


async def test_a_port_in_use_is_one_clear_line() -> None:
    async with MetricsServer(new_registry(), list) as server:
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}: Address already in use"):
            await MetricsServer(new_registry(), list, port=server.port).start()


async def test_it_ends_though_a_client_holds_its_connection() -> None:
    server = MetricsServer(new_registry(), list)
    await server.start()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n")
    await writer.drain()
    async with asyncio.timeout(30):
        await server.close()
    writer.close()
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", server.port)
