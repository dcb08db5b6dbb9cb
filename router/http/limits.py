"""The outermost layer of every HTTP request: its id, its key, its size, its last resort.

Owns the request id, limits on headers and body, and the answer to bugs of our own; knows of all paths only
those that need no key. Invariant: the application sees a request only when its key is valid and its body
complete and within the limit, and every answer carries ``X-Request-Id``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http.errors import error_response, internal_error, response_to
from splitserve.api_keys import Keyring
from splitserve.errors import InvalidRequest, Unauthenticated

log = logging.getLogger(__name__)

MAX_REQUEST_ID = 128  # characters
OPEN_PATHS = frozenset({"/live", "/ready", "/health"})  # probes have no key: they learn a status, no reasons
_DISCARD_SECONDS = 2.0
_DISCARD_LIMITS = 8  # times the limit of a body


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may weigh, in bytes, and how long it may take to arrive, in seconds."""

    body_bytes: int = 8 * 2**20
    header_bytes: int = 32 * 2**10
    body_seconds: float = 30.0


def valid_request_id(text: str) -> bool:
    """Whether a client's request id may appear in logs and headers: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()


def new_request_id() -> str:
    return uuid.uuid4().hex


class RequestGate:
    """ASGI middleware; leaves ``request_id`` and ``tenant`` in ``scope["state"]``.

    The tenant is the name of the client's API key: empty without keys, ``None`` for a probe without one."""

    def __init__(self, app: ASGIApp, limits: RequestLimits, keyring: Keyring) -> None:
        self._app = app
        self._limits = limits
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())],
                }
            await send(message)

        try:
            if _head_bytes(scope) > self._limits.header_bytes:
                refusal = error_response(431, f"address and headers of over {self._limits.header_bytes} bytes")
                await _refuse(refusal, scope, receive, send_with_id)
                return
            try:
                scope["state"]["tenant"] = self._tenant(scope)
            except Unauthenticated as error:
                await _discard(receive, self._limits.body_bytes, more=_has_body(scope))
                await _refuse(response_to(error), scope, receive, send_with_id)
                return
            body = await self._body(scope, receive, send_with_id)
            if body is not None:
                await self._app(scope, _replay(body, receive), send_with_id)
        except Exception:
            log.exception("bug while serving %s %s", scope["method"], scope["path"])
            if started:
                raise  # the server breaks the connection off, so that the client sees an incomplete answer
            await internal_error()(scope, receive, send_with_id)

    def _tenant(self, scope: Scope) -> str | None:
        """Raises Unauthenticated."""
        try:
            return self._keyring.tenant(_header(scope, b"authorization"))
        except Unauthenticated:
            if scope["path"] in OPEN_PATHS:
                return None
            raise

    async def _body(self, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """The whole body; ``None`` if the request was answered or the client left."""
        limit = self._limits.body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        too_large = _content_length(scope) > limit
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more and not too_large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    parts.append(part)
                    more = message.get("more_body", False)
                    too_large = size > limit
        except TimeoutError:
            late = error_response(408, f"The body did not arrive within {self._limits.body_seconds:g} s")
            await _refuse(late, scope, receive, send)
            return None
        if too_large:
            parts.clear()
            await _discard(receive, _DISCARD_LIMITS * limit, more)
            refusal = error_response(413, f"The body is over the limit of {limit} bytes")
            await _refuse(refusal, scope, receive, send)
            return None
        return b"".join(parts)


async def _discard(receive: Receive, limit: int, more: bool) -> None:
    """Reads a while: to close a connection on bytes unread would destroy the answer on its way."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while more and size < limit:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


async def _refuse(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request that may not have been read to its end, so its connection cannot be used again."""
    answer.headers["Connection"] = "close"
    await answer(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body in one message, then whatever the server says (that the client left)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    return given if given is not None and valid_request_id(given) else new_request_id()


def _content_length(scope: Scope) -> int:
    length = _header(scope, b"content-length") or ""
    return int(length) if length.isdecimal() else 0


def _has_body(scope: Scope) -> bool:
    return _content_length(scope) > 0 or _header(scope, b"transfer-encoding") is not None


def _head_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope["raw_path"]) + len(scope["query_string"])


def _header(scope: Scope, wanted: bytes) -> str | None:
    """The first header of this name, which is in small letters."""
    for name, value in scope["headers"]:
        if name == wanted:
            return str(value.decode("latin-1"))
    return None


def request_timeout(value: str | None, longest: float) -> float:
    """Seconds that the header ``X-Request-Timeout`` asks for, at most ``longest``. Raises ``InvalidRequest``."""
    if value is None:
        return longest
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InvalidRequest(f"X-Request-Timeout must be a positive number of seconds, got {value[:32]!r}")
    return min(seconds, longest)
