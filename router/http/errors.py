"""Errors in the shape that OpenAI's clients know.

Owns the body ``{"error": {message, type, param, code}}`` and the headers that go with it.
Invariant: every answer with a status of 400 and above has this body, whatever raised it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from router.admission import ContextLengthExceeded
from splitserve.errors import NotFound, SplitServeError, Unauthenticated

log = logging.getLogger(__name__)

MAX_MESSAGE = 2048  # characters of a message: some repeat what the client sent
MAX_PARAM = 256
CLIENT_GONE = 499  # nobody reads it; for logs and tests
_KINDS = {404: "not_found_error", 408: "timeout_error"}


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    param = None if param is None else param[:MAX_PARAM]
    return orjson.dumps({"error": {"message": message[:MAX_MESSAGE], "type": kind, "param": param, "code": code}})


def error_response(
    status: int,
    message: str,
    kind: str | None = None,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer of ``status`` in OpenAI's shape."""
    kind = kind or _KINDS.get(status) or ("invalid_request_error" if status < 500 else "internal_error")
    body = error_body(message, kind, param, code)
    return Response(body, status, dict(headers or {}), media_type="application/json")


def body_of(error: SplitServeError) -> bytes:
    """The body alone, for an error in the middle of a stream."""
    return error_body(error.public, error.kind, getattr(error, "field", None), _code(error))


def response_to(error: SplitServeError) -> Response:
    """Status, body and the headers of an error of our own tree."""
    retry_after = getattr(error, "retry_after", None)
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(body_of(error), error.http_status, headers, media_type="application/json")


def internal_error() -> Response:
    """For bugs of our own: says nothing of what went wrong, the log does."""
    return error_response(500, "Internal server error")


def install_error_handlers(app: FastAPI) -> None:
    """Makes ``app`` answer every failure of a request in OpenAI's shape."""
    app.add_exception_handler(SplitServeError, _on_own_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_client_gone)


async def _on_own_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, SplitServeError)
    if error.http_status == 500:
        log.error("request failed: %s", error.message, exc_info=error)
    elif error.public != error.message:
        log.warning("request failed: %s", error.message)
    return response_to(error)


async def _on_invalid_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = _field_path(first["loc"])
    if first["type"] == "json_invalid":
        return error_response(400, f"The body is not valid JSON: {first['ctx']['error']}")
    # a field that takes several types has an error for each
    alternatives = dict.fromkeys(e["msg"] for e in error.errors() if _field_path(e["loc"]) == where)
    return error_response(400, f"{where or 'The body'}: {'; or '.join(alternatives)}", param=where or None)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"Unknown path: {request.url.path}"
    elif error.status_code == 405:
        message = f"Method {request.method} is not allowed for {request.url.path}"
    return error_response(error.status_code, message, headers=error.headers)


async def _on_client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _code(error: SplitServeError) -> str | None:
    if isinstance(error, Unauthenticated):
        return "invalid_api_key"
    if isinstance(error, NotFound) and error.field == "model":
        return "model_not_found"
    if isinstance(error, ContextLengthExceeded):
        return "context_length_exceeded"
    return None


def _field_path(location: Sequence[Any]) -> str:
    """``("body", "messages", 0, "content", "str")`` is ``messages[0].content``: names of types are left out."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.isidentifier() or part in {"str", "int", "float", "bool"}:
            break
        else:
            path += f".{part}" if path else part
    return path
