"""Certificates of a throw-away authority on real servers: who gets in, and what a wrong file says."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc.aio
import httpx
import pytest
import trustme
from prometheus_client import CollectorRegistry

from splitserve.api_keys import ApiKey, Keyring
from splitserve.config import TlsFiles
from splitserve.errors import ConfigError
from splitserve.grpc_server import GrpcServer, check_health
from splitserve.metrics_server import MetricsServer
from splitserve.redis_client import RedisClient
from splitserve.redis_server import PrivateRedis
from splitserve.tls import check_files

Issue = Callable[..., TlsFiles]


@pytest.fixture(scope="session")
def issue(tmp_path_factory: pytest.TempPathFactory) -> Issue:
    """``issue(authority, *names)``: a certificate of the authority with this name, for loopback by default."""
    directory = tmp_path_factory.mktemp("certificates")
    authorities: dict[str, trustme.CA] = {}

    def make(authority: str = "ours", *names: str) -> TlsFiles:
        ca = authorities.setdefault(authority, trustme.CA())
        leaf = ca.issue_cert(*(names or ("127.0.0.1",)))
        stem = directory / "-".join((authority, *names))
        paths = [Path(f"{stem}.{part}") for part in ("cert", "key", "ca")]
        paths[0].write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        paths[1].write_bytes(leaf.private_key_pem.bytes())
        ca.cert_pem.write_to_path(str(paths[2]))
        return TlsFiles(*map(str, paths))

    return make


@contextlib.asynccontextmanager
async def serving(tls: TlsFiles) -> AsyncIterator[str]:
    async with GrpcServer("127.0.0.1", 0, [], lambda _: None, grace=0, tls=tls) as server:
        await server.ready()
        yield server.address


async def test_processes_of_one_authority_reach_each_other(issue: Issue) -> None:
    async with serving(issue()) as address:
        assert await check_health(address, tls=issue())


async def test_a_stranger_does_not_get_in(issue: Issue) -> None:
    ours, foreign = issue(), issue("foreign")
    async with serving(ours) as address:
        assert not await check_health(address)
        assert not await check_health(address, tls=foreign)
        assert not await check_health(address, tls=replace(foreign, ca=ours.ca)), "believes us, is not believed"
        nameless = grpc.ssl_channel_credentials(Path(ours.ca or "").read_bytes())
        async with grpc.aio.secure_channel(address, nameless) as channel:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await channel.channel_ready()


async def test_a_server_under_another_name_is_not_believed(issue: Issue) -> None:
    async with serving(issue("ours", "10.0.0.9")) as address:
        assert not await check_health(address, tls=issue())


async def test_metrics_of_a_worker_need_a_key_and_are_encrypted(issue: Issue) -> None:
    tls, keyring = issue(), Keyring([ApiKey.of("sk-one", "scraper")])
    context = ssl.create_default_context(cafile=tls.ca)
    async with (
        MetricsServer(CollectorRegistry(), lambda: ["worker is lost"], keyring=keyring, tls=tls) as server,
        httpx.AsyncClient(base_url=server.url, verify=context) as client,
    ):
        assert server.url.startswith("https://")
        for path in ("/metrics", "/nothing"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/metrics", headers={"Authorization": "Bearer sk-one"})).status_code == 200
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/ready")).text == "not ready\n"


@contextlib.asynccontextmanager
async def behind_tls(redis: PrivateRedis, files: TlsFiles) -> AsyncIterator[str]:
    """A mutual TLS door in front of a Redis that knows none; yields its rediss:// address."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(redis.socket)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.cert, files.key)
    door = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with door:
        yield f"rediss://127.0.0.1:{door.sockets[0].getsockname()[1]}"


async def test_redis_is_reached_over_mutual_tls(own_redis: PrivateRedis, issue: Issue) -> None:
    async with behind_tls(own_redis, issue()) as url:
        client = RedisClient(url, 5.0, issue())
        assert await client.execute("ECHO", "x") == b"x"
        await client.close()
        stranger = RedisClient(url, 5.0, issue("foreign"))
        with pytest.raises(ConfigError, match="cannot use Redis"):
            await stranger.connect()
        await stranger.close()


async def test_files_that_do_not_fit_are_one_line_at_the_start(issue: Issue, tmp_path: Path) -> None:
    ours = issue()
    junk = tmp_path / "junk"
    junk.write_text("not PEM")
    for files in (
        replace(ours, key=issue("foreign").key),
        replace(ours, cert=str(junk)),
        replace(ours, ca=str(junk)),
        replace(ours, cert=str(tmp_path / "none")),
    ):
        with pytest.raises(ConfigError) as caught:
            check_files(files)
        assert "\n" not in caught.value.message
