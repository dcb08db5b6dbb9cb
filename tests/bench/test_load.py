"""Loads on a real server that echoes, and on servers that misbehave."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import numpy as np
import pytest

from bench.datasets import Conversation, Lengths, Tokens, Turn, multi_turn, random_prompts
from bench.http_client import Server
from bench.load import Client, run_load
from bench.openai_api import Api
from router.echo import EchoConfig
from splitserve.errors import EngineError

ServeEcho = Callable[[EchoConfig], AbstractAsyncContextManager[str]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'


def prompts(count: int, output: int = 6) -> list[Conversation]:
    return random_prompts(Tokens(np.random.default_rng(), 30_000), count, Lengths(12, output))


def client(url: str, chat: bool = False, timeout: float = 10.0) -> Client:
    return Client(Server.parse(url), Api("echo", chat=chat, ignore_eos=True), timeout)


@asynccontextmanager
async def answering(data: bytes, hang: bool = False) -> AsyncIterator[str]:
    """A server that answers every request with these bytes, then closes or hangs."""
    released = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        if hang:
            await released.wait()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        released.set()


@pytest.mark.parametrize("chat", [False, True])
async def test_every_token_of_every_answer_is_recorded(serve_echo: ServeEcho, chat: bool) -> None:
    async with serve_echo(EchoConfig()) as url:
        result = await run_load(client(url, chat), prompts(8), [0.0] * 8, 3)
    assert [record.error for record in result.records] == [None] * 8
    assert all(record.output_tokens == 6 == sum(a.tokens for a in record.arrivals) for record in result.records)
    assert all(record.counted and record.prompt_tokens >= 12 for record in result.records)


async def test_tokens_of_one_event_are_counted(serve_echo: ServeEcho) -> None:
    async with serve_echo(EchoConfig(tokens_per_chunk=4, cached_tokens=8)) as url:
        result = await run_load(client(url), prompts(1, output=9), [0.0])
    assert [arrival.tokens for arrival in result.records[0].arrivals] == [1, 4, 4]
    assert result.records[0].cached_tokens == 8


async def test_a_closed_loop_never_runs_more_than_it_may(serve_echo: ServeEcho) -> None:
    async with serve_echo(EchoConfig(first_delay=0.01)) as url:
        result = await run_load(client(url), prompts(9), [0.0] * 9, 2)
    edges = [(r.sent, 1) for r in result.records] + [(r.ended, -1) for r in result.records]
    running = np.cumsum([change for _, change in sorted(edges)])
    assert running.max() == 2


async def test_an_open_loop_does_not_wait_for_answers(serve_echo: ServeEcho) -> None:
    async with serve_echo(EchoConfig(first_delay=0.3)) as url:
        result = await run_load(client(url), prompts(3), [0.0, 0.05, 0.1])
    assert max(record.sent for record in result.records) < min(record.ended for record in result.records)
    assert all(record.sent >= record.scheduled for record in result.records)


async def test_enough_ends_a_run_and_calls_off_what_is_running(serve_echo: ServeEcho) -> None:
    async with serve_echo(EchoConfig(first_delay=0.05)) as url:
        result = await run_load(client(url), prompts(20), [0.0] * 20, 2, lambda record: True)
    assert 1 <= len(result.records) <= 2


async def test_a_conversation_carries_its_history(serve_echo: ServeEcho) -> None:
    chats = multi_turn(Tokens(np.random.default_rng(), 30_000), 3, Lengths(10, 4), turns=3, system=5, think=0.0)
    async with serve_echo(EchoConfig()) as url:
        result = await run_load(client(url), chats, [0.0])
    assert [record.prompt_tokens for record in result.records] == [15, 29, 43]


async def test_a_refusal_is_recorded_with_its_reason(serve_echo: ServeEcho) -> None:
    async with serve_echo(EchoConfig()) as url:
        result = await run_load(client(url), [Conversation((Turn([1] * 40_000, 4),))], [0.0])
    assert (result.records[0].error or "").startswith("status 400")


async def test_a_failure_in_the_middle_is_a_failure_and_ends_the_conversation(serve_echo: ServeEcho) -> None:
    chats = multi_turn(Tokens(np.random.default_rng(), 30_000), 2, Lengths(10, 4), turns=2, system=0, think=0.0)
    async with serve_echo(EchoConfig(failure=EngineError("broken"), fail_after=2)) as url:
        result = await run_load(client(url), chats, [0.0])
    assert len(result.records) == 1
    assert "the engine failed on this request" in (result.records[0].error or "")
    assert len(result.records[0].arrivals) == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "closed before"),
        (b"nonsense\r\n\r\n", "not HTTP"),
        (HEAD, "closed before"),
        (HEAD + b"0\r\n\r\n", "without tokens"),
        (HEAD + b"9\r\ndata: x\n\n\r\n", "not an event"),
        (HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVENT), EVENT), "without [DONE]"),
    ],
)
async def test_servers_that_misbehave_are_failures(data: bytes, reason: str) -> None:
    async with answering(data) as url:
        result = await run_load(client(url), prompts(2), [0.0] * 2)
    assert [reason in (record.error or "") for record in result.records] == [True, True], result.records


async def test_an_answer_that_never_ends_is_given_up() -> None:
    async with answering(HEAD, hang=True) as url:
        result = await run_load(client(url, timeout=0.1), prompts(1), [0.0])
    assert "no complete answer within" in (result.records[0].error or "")


async def test_a_server_that_is_not_there_is_a_failure() -> None:
    result = await run_load(client("http://127.0.0.1:9"), prompts(1), [0.0])
    assert (result.records[0].error or "").startswith("connection")
    assert math.isfinite(result.duration)
