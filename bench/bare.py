"""The least that a server in Python can do: made-up events from a bare socket, ``python -m bench.bare --port P``.

No routing, no JSON, no validation; the same bytes in as many writes. What the router's front needs beyond this is
its own. Ready when ``/health`` answers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import cast

import orjson
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n"
_MODELS = orjson.dumps({"object": "list", "data": [{"id": "bare", "object": "model"}]})


def _event(body: dict[str, object]) -> bytes:
    data = b"data: " + orjson.dumps(body) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._received = b""
        self._left = 0
        self._total = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        if head.startswith(b"GET"):
            length = b"Content-Length: %d\r\nConnection: close\r\n" % len(_MODELS)
            self._transport.write(_HEAD % (b"application/json", length) + _MODELS)
            self._transport.close()
            return
        wanted = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) >= wanted:
            self._received = b""
            self._left = self._total = orjson.loads(body)["max_tokens"]
            self._transport.write(_HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked\r\n"))
            self._next()

    def _next(self) -> None:
        if self._transport.is_closing():
            return
        self._left -= 1
        usage = {
            "prompt_tokens": 1,
            "completion_tokens": self._total - self._left,
            "total_tokens": 1 + self._total - self._left,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
        head = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 0, "model": "bare"}
        self._transport.write(_event({**head, "choices": [choice], "usage": usage}))
        if self._left:
            asyncio.get_running_loop().call_soon(self._next)
            return
        done = b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))
        self._transport.close()


async def serve(port: int) -> None:
    """Serves until the process is ended."""
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cores", type=int, nargs="+")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    uvloop.run(serve(options.port))


if __name__ == "__main__":
    main()
