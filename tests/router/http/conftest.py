"""A real HTTP server on a loopback port, with a backend that echoes and the demo model's tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from router.backend import ModelSpec
from router.echo import EchoBackend, EchoConfig
from router.http import HttpConfig, create_app
from splitserve.http_server import HttpServer
from splitserve.metrics import RouterMetrics


@dataclass
class Front:
    """A running server and ways to talk to it."""

    url: str
    app: FastAPI
    backend: EchoBackend
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def complete(self, **body: Any) -> dict[str, Any]:
        """Posts a completion and returns its body."""
        response = await self.http.post("/v1/completions", json={"model": "echo", **body})
        assert response.status_code == 200, response.text
        result: dict[str, Any] = response.json()
        return result


Serve = Callable[..., AbstractAsyncContextManager[Front]]


@pytest.fixture(scope="session")
def serve(spec: ModelSpec) -> Serve:
    """``serve(config, *specs)``: a front over an echo of these models (default: one named ``echo``)."""

    @asynccontextmanager
    async def run(
        config: EchoConfig | None = None, *specs: ModelSpec, http_config: HttpConfig | None = None
    ) -> AsyncIterator[Front]:
        backend = EchoBackend(specs or [spec], config)
        registry = CollectorRegistry()
        app = create_app(backend, http_config, RouterMetrics(registry), registry)
        async with (
            HttpServer(app, "127.0.0.1", 0, grace=1.0) as server,
            httpx.AsyncClient(base_url=server.url, timeout=20) as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield Front(server.url, app, backend, http, client)

    return run


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_front(serve: Serve) -> AsyncIterator[Front]:
    """One server for all tests that need no special backend."""
    async with serve() as running:
        yield running


@pytest.fixture
def front(shared_front: Front) -> Front:
    """A front over an echo without delays, whose backend has seen no requests."""
    shared_front.backend.requests.clear()
    return shared_front
