"""Work ends when its reader leaves, when its time is over, and never later than its response."""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from router.echo import EchoConfig
from router.http import HttpConfig

pytestmark = pytest.mark.asyncio(loop_scope="session")

SLOW = EchoConfig(token_delay=0.01)
ENDLESS = {"prompt": "a b c", "ignore_eos": True, "max_tokens": 390}


async def idle(front: Any) -> None:
    """Waits, for at most 5 s, until the backend has nothing to do."""
    async with asyncio.timeout(30):
        while front.backend.active:
            await asyncio.sleep(0.005)


async def busy(front: Any, count: int = 1) -> None:
    async with asyncio.timeout(30):
        while front.backend.active < count:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_a_stream_cancels_its_work(serve: Any, caplog: Any, n: int) -> None:
    async with serve(SLOW) as front:
        async with front.http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True, "n": n}) as r:
            async for _ in r.aiter_lines():
                break
        await idle(front)
        assert front.backend.cancelled == n
        assert (await front.http.get("/live")).status_code == 200
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_before_a_plain_answer_cancels_its_work(serve: Any, n: int) -> None:
    async with serve(SLOW) as front:
        task = asyncio.create_task(front.http.post("/v1/completions", json={**ENDLESS, "n": n}))
        await busy(front, n)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await idle(front)
        assert front.backend.cancelled == n


async def test_leaving_before_the_first_token_cancels_its_work(serve: Any) -> None:
    async with serve(EchoConfig(first_delay=60)) as front:
        task = asyncio.create_task(front.http.post("/v1/completions", json={**ENDLESS, "stream": True}))
        await busy(front)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await idle(front)
        assert front.backend.cancelled == 1


async def test_a_reset_connection_cancels_its_work(serve: Any) -> None:
    async with serve(SLOW) as front:
        body = orjson.dumps({**ENDLESS, "stream": True})
        address = urlsplit(front.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readuntil(b"data: ")
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
        writer.transport.abort()
        await idle(front)
        assert front.backend.cancelled == 1


async def test_a_request_may_limit_its_time(serve: Any) -> None:
    async with serve(EchoConfig(first_delay=60)) as front:
        for stream in (False, True):
            response = await front.http.post(
                "/v1/completions",
                json={**ENDLESS, "stream": stream},
                headers={"X-Request-Timeout": "0.05"},
            )
            assert response.status_code == 504
            assert response.json()["error"]["type"] == "timeout_error"
        assert front.backend.active == 0
        assert front.backend.requests[0].deadline is not None


async def test_time_that_ends_in_a_stream_is_an_event(serve: Any) -> None:
    async with serve(SLOW) as front:
        response = await front.http.post(
            "/v1/completions", json={**ENDLESS, "stream": True}, headers={"X-Request-Timeout": "0.3"}
        )
        assert response.status_code == 200
        assert "timeout_error" in response.text.split("\n\n")[-3]
        assert front.backend.active == 0


async def test_a_reader_that_never_reads_holds_nothing_beyond_its_time(serve: Any) -> None:
    large = {
        "messages": [{"role": "user", "content": "a"}],
        "stream": True,
        "ignore_eos": True,
        "n": 16,
        "logprobs": True,
        "top_logprobs": 20,
    }
    async with serve(http_config=HttpConfig(request_seconds=2.5)) as front:
        body = orjson.dumps(large)
        address = urlsplit(front.url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.hostname, address.port))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await busy(front, 16)
            await idle(front)
            assert front.backend.cancelled == 16


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
async def test_a_time_limit_must_be_positive(front: Any, value: str) -> None:
    response = await front.http.post("/v1/completions", json=ENDLESS, headers={"X-Request-Timeout": value})
    assert response.status_code == 400


async def test_many_leavers_leave_nothing_behind(serve: Any) -> None:
    async with serve(SLOW) as front:
        before = len(asyncio.all_tasks())

        async def leave(number: int) -> None:
            body = {**ENDLESS, "stream": bool(number % 2), "n": 1 + number % 3}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05 + number % 7 / 50):
                    await front.http.post("/v1/completions", json=body)

        await asyncio.gather(*map(leave, range(40)))
        await idle(front)
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)
        assert (await front.http.get("/live")).status_code == 200
