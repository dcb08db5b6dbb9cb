"""With keys set nothing answers without one, but probes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from router.backend import ModelSpec
from router.echo import EchoBackend, EchoConfig
from router.http import create_app
from splitserve.api_keys import ApiKey, Keyring

KEYS = Keyring([ApiKey.of("sk-alice", "alice"), ApiKey.of("sk-bob", "bob")])
ALICE, BOB = {"Authorization": "Bearer sk-alice"}, {"Authorization": "Bearer sk-bob"}


def client(spec: ModelSpec, config: EchoConfig | None = None) -> tuple[httpx.AsyncClient, EchoBackend, Any]:
    backend = EchoBackend([spec], config)
    app = create_app(backend, keyring=KEYS)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x"), backend, app


async def test_every_route_but_probes_asks_for_a_key(spec: ModelSpec) -> None:
    http, backend, app = client(spec)
    paths = {(m, r.path) for r in app.routes if isinstance(r, APIRoute) for m in r.methods}
    paths |= {("GET", p) for p in ("/docs", "/openapi.json", "/metrics", "/nothing", "/live/", "//live")}
    async with http:
        for method, path in paths:
            answer = await http.request(method, path)
            assert (answer.status_code == 200) == (path in ("/live", "/ready", "/health")), path
            if answer.status_code != 200:
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert backend.requests == []


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json"])
async def test_a_key_opens_every_route(spec: ModelSpec, path: str) -> None:
    http, _, _ = client(spec)
    async with http:
        assert (await http.get(path, headers=BOB)).status_code == 200


async def test_a_probe_without_a_key_learns_a_status_and_no_reason(spec: ModelSpec) -> None:
    http, _, _ = client(spec, EchoConfig(not_ready=("worker decode-7 is away",)))
    async with http:
        stranger, known = await http.get("/ready"), await http.get("/ready", headers=ALICE)
    assert stranger.status_code == known.status_code == 503
    assert "decode-7" not in stranger.text
    assert "decode-7" in known.text


async def test_tenants_never_share_a_salt(spec: ModelSpec) -> None:
    http, backend, _ = client(spec)
    async with http:
        for headers in (ALICE, BOB):
            for salt in (None, "s", '"]["bob", "s'):
                body = {"prompt": "a", "cache_salt": salt}
                assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        again = await http.post("/v1/completions", json={"prompt": "b", "cache_salt": "s"}, headers=ALICE)
    assert again.status_code == 200
    salts = [request.cache_salt for request in backend.requests]
    assert len(set(salts[:6])) == 6
    assert salts[6] == salts[1]


@pytest.mark.parametrize("host", ["x/live?", "x/live#", "x/health?a=", "x/ready/../", "@x/live?"])
async def test_a_host_header_with_a_path_opens_nothing(spec: ModelSpec, host: str) -> None:
    """Frameworks rebuild the URL from it; what is asked for stands in the request line."""
    http, _, _ = client(spec)
    async with http:
        assert (await http.get("/v1/models", headers={"Host": host})).status_code == 401
