"""Request ids, and sizes that are refused before anything is read into them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from router.http import HttpConfig
from router.http.limits import RequestLimits, valid_request_id

pytestmark = pytest.mark.asyncio(loop_scope="session")

LIMIT = 8 * 2**20
PATH = "/v1/completions"


async def test_the_clients_request_id_comes_back(front: Any) -> None:
    response = await front.http.post(PATH, json={"prompt": "a"}, headers={"X-Request-Id": "my-id 1"})
    assert response.headers["x-request-id"] == "my-id 1"
    assert response.json()["id"] == "cmpl-my-id 1"
    assert front.backend.requests[0].request_id.startswith("my-id 1-")


@pytest.mark.parametrize("given", ["", "x" * 129, "é", "tab\there"])
async def test_ids_unfit_for_logs_are_replaced(front: Any, given: str) -> None:
    response = await front.http.get("/live", headers={"X-Request-Id": given.encode()})
    [returned] = response.headers.get_list("x-request-id")
    assert returned != given
    assert valid_request_id(returned)


async def test_a_body_over_the_limit_is_refused(front: Any) -> None:
    response = await front.http.post(PATH, content=b" " * (LIMIT + 1))
    assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")
    assert str(LIMIT) in response.json()["error"]["message"]


async def test_a_body_of_unknown_length_is_counted(front: Any) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(LIMIT // 2**16 + 1):
            yield b" " * 2**16

    response = await front.http.post(PATH, content=chunks())
    assert response.status_code == 413


async def test_a_body_at_the_limit_is_read(front: Any) -> None:
    body = b'{"prompt": "a"}'
    response = await front.http.post(
        PATH, content=body + b" " * (LIMIT - len(body)), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200


async def test_large_headers_are_refused(front: Any) -> None:
    response = await front.http.get("/live", headers={"X-Large": "x" * 40_000})
    assert response.status_code in (400, 431)


async def test_a_body_that_never_comes_is_given_up(serve: Any) -> None:
    limits = RequestLimits(body_seconds=0.1)
    async with serve(http_config=HttpConfig(limits=limits)) as front:
        address = urlsplit(front.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n".encode())
        async with asyncio.timeout(30):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"within 0.1 s" in answer


async def test_broken_http_does_not_reach_the_application(front: Any) -> None:
    address = urlsplit(front.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"GARBAGE\r\n\r\n")
    async with asyncio.timeout(30):
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
    writer.close()
    await writer.wait_closed()
