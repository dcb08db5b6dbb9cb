"""Records made by hand, and a real server that echoes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench.echo import echo_spec
from bench.record import Arrival, Record
from router.echo import EchoBackend, EchoConfig
from router.http import create_app
from splitserve.http_server import HttpServer
from splitserve.text import Tokenizer

ServeEcho = Callable[[EchoConfig], AbstractAsyncContextManager[str]]


@pytest.fixture
def serve_echo(demo_tokenizer: Tokenizer) -> ServeEcho:
    """``async with serve_echo(config) as url``: the router's HTTP front over an echo, model ``echo``."""

    @asynccontextmanager
    async def run(config: EchoConfig) -> AsyncIterator[str]:
        app = create_app(EchoBackend([echo_spec(demo_tokenizer)], config))
        async with HttpServer(app, "127.0.0.1", 0, grace=1.0) as server:
            yield server.url

    return run


MakeRecord = Callable[..., Record]


@pytest.fixture
def make_record() -> MakeRecord:
    """``make_record((time, tokens), ...)``: a request sent at 10 s whose tokens arrived at these times."""

    def make(*arrivals: tuple[float, int], **changes: Any) -> Record:
        values: dict[str, Any] = {
            "scheduled": 10.0,
            "sent": 10.0,
            "ended": arrivals[-1][0] if arrivals else 11.0,
            "arrivals": tuple(Arrival(*arrival) for arrival in arrivals),
            "prompt_tokens": 5,
            "output_tokens": sum(tokens for _, tokens in arrivals),
        }
        return Record(**values | changes)

    return make


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """Three requests: two share their first block, the third stands alone."""
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 40, "hash_ids": [0, 1, 2]},
        {"timestamp": 2000, "input_length": 600, "output_length": 20, "hash_ids": [0, 3]},
        {"timestamp": 3000, "input_length": 300, "output_length": 10, "hash_ids": [4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    return path
