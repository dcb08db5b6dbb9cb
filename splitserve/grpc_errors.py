"""How an error of ours crosses gRPC: as a status, a message and trailing metadata, and back.

Knows no service. Invariant: an error that a servicer raises reaches the caller as the same class of the tree
in ``splitserve.errors``, and nothing of an unexpected one (its text, its traceback) leaves the process.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from splitserve import errors
from splitserve.errors import (
    BY_GRPC_STATUS,
    DeadlineExceeded,
    EngineError,
    Incompatible,
    InvalidRequest,
    NotFound,
    Overloaded,
    PeerLost,
    RequestTooLarge,
    SplitServeError,
    TransferFailed,
    Unavailable,
)

logger = logging.getLogger(__name__)
PARTING_SECONDS = 60.0  # that a caller who took no message has to take it and hear the end

KIND, RETRY_AFTER, FIELD, REASON = "splitserve-error", "retry-after", "splitserve-field", "splitserve-reason"
MAX_MESSAGE = 2048  # characters; trailers of 8 KiB and more are refused by peers

_KINDS: dict[str, type[SplitServeError]] = {
    kind.__name__: kind
    for kind in (*BY_GRPC_STATUS.values(), RequestTooLarge, TransferFailed, EngineError, errors.ConfigError)
}

Metadata = tuple[tuple[str, str], ...]


def error_metadata(error: SplitServeError) -> Metadata:
    """Trailing metadata that names the class of ``error`` and what it carries beside its message."""
    pairs = [(KIND, type(error).__name__)]
    if isinstance(error, Overloaded | Unavailable):
        pairs.append((RETRY_AFTER, f"{error.retry_after:g}"))
    if isinstance(error, TransferFailed):
        pairs.append((REASON, _ascii(error.reason)))
    if isinstance(error, InvalidRequest | NotFound) and error.field is not None:
        pairs.append((FIELD, _ascii(error.field)))
    return tuple(pairs)


def error_from_rpc(error: grpc.aio.AioRpcError) -> SplitServeError:
    """The error that the peer raised; for failures of gRPC itself, the nearest of ours.

    A failure of the connection, whatever status gRPC gives it, is PeerLost: another worker may do.
    """
    message = error.details() or error.code().name
    trailer = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    kind = _KINDS.get(trailer.get(KIND, ""))
    if kind is None:
        by_status = {"UNIMPLEMENTED": Incompatible, "UNKNOWN": EngineError} | BY_GRPC_STATUS
        kind = by_status.get(error.code().name, PeerLost)
        kind = PeerLost if kind is Unavailable else kind
    if issubclass(kind, TransferFailed):
        failure = kind(message, trailer.get(REASON, "unknown"))
        failure.retry_after = _seconds(trailer.get(RETRY_AFTER))
        return failure
    if issubclass(kind, Overloaded | Unavailable):
        return kind(message, _seconds(trailer.get(RETRY_AFTER)))
    if issubclass(kind, InvalidRequest | NotFound):
        return kind(message, trailer.get(FIELD))
    return kind(message)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what servicers raise into statuses. Cancellation passes unlogged: the caller went away.

    ``public``: callers are told `SplitServeError.public`, not what the error says among ourselves.
    ``write_seconds``: a caller that takes no message of a stream for so long is given up."""

    def __init__(self, public: bool = False, write_seconds: float | None = None) -> None:
        self._public = public
        self._write_seconds = write_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        behaviour = next(
            behaviour
            for behaviour in (
                handler.unary_unary,
                handler.unary_stream,
                handler.stream_unary,
                handler.stream_stream,
            )
            if behaviour is not None
        )
        method = handler_call_details.method
        if handler.response_streaming:
            wrapped = _wrap_stream(behaviour, method, self._public, self._write_seconds)
        else:
            wrapped = _wrap_unary(behaviour, method, self._public)
        make = getattr(grpc, _HANDLERS[handler.request_streaming, handler.response_streaming])
        refuse_here = wrapped is not behaviour and not handler.request_streaming
        return make(
            wrapped,
            request_deserializer=_reader(handler.request_deserializer)
            if refuse_here
            else handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


_HANDLERS = {
    (False, False): "unary_unary_rpc_method_handler",
    (False, True): "unary_stream_rpc_method_handler",
    (True, False): "stream_unary_rpc_method_handler",
    (True, True): "stream_stream_rpc_method_handler",
}


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a request that is no message of its method. gRPC itself would log a traceback for each."""

    reason: str


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Unreadable(str(error))

    return read


def _check_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise InvalidRequest(request.reason)


def _wrap_unary(behaviour: Callable[..., Any], method: str, public: bool) -> Callable[..., Any]:
    if not inspect.iscoroutinefunction(behaviour):
        return behaviour  # of a synchronous servicer, which runs in a thread of gRPC's own

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            _check_readable(request)
            return await behaviour(request, context)
        except Exception as error:
            await _abort(error, context, method, public)

    return call


def _wrap_stream(
    behaviour: Callable[..., Any], method: str, public: bool, write_seconds: float | None
) -> Callable[..., Any]:
    if not (inspect.isasyncgenfunction(behaviour) or inspect.iscoroutinefunction(behaviour)):
        return behaviour

    # Written with context.write rather than yield: a cancelled call is then cancelled inside this coroutine,
    # and the servicer's generator is closed here and now instead of by the garbage collector.
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            _check_readable(request)
            if inspect.isasyncgenfunction(behaviour):
                async with aclosing(behaviour(request, context)) as messages:
                    await _write_all(messages, context, write_seconds)
            else:
                await behaviour(request, context)
        except _Stalled as stalled:
            logger.warning("%s: no message was taken for %g s, the caller is given up", method, write_seconds)
            await asyncio.wait({stalled.write}, timeout=PARTING_SECONDS)  # no status can overtake it
            if not stalled.write.done():
                raise asyncio.CancelledError from stalled
            error = DeadlineExceeded(f"no message was taken for {write_seconds:g} s")
            await _abort(error, context, method, public)
        except Exception as error:
            await _abort(error, context, method, public)

    return call


class _Stalled(Exception):
    """The caller takes no messages; ``write`` is of the one that is stuck."""

    def __init__(self, write: asyncio.Future[None]) -> None:
        self.write = write


async def _write_all(
    messages: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any], seconds: float | None
) -> None:
    async for message in messages:
        if seconds is None:
            await context.write(message)
            continue
        write = asyncio.ensure_future(context.write(message))
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(write)
        except TimeoutError as error:
            raise _Stalled(write) from error
        except asyncio.CancelledError:
            write.cancel()
            raise


async def _abort(
    error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str, public: bool
) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if context.cancelled():
        raise error
    if not isinstance(error, SplitServeError):
        logger.error("%s failed", method, exc_info=error)
        error = EngineError("internal error")
    status = grpc.StatusCode[error.grpc_status]
    message = error.public if public else error.message
    await context.abort(status, message[:MAX_MESSAGE], error_metadata(error))


def _ascii(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:128]


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text)) if text is not None else 1.0
    except ValueError:
        return 1.0
