"""API keys at the door of a gRPC server.

Owns the refusal; knows no service. Invariant: without a valid key nothing answers, reflection and unknown
methods included, but the health check of a probe, which says a status and nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from splitserve.api_keys import Keyring
from splitserve.errors import Unauthenticated
from splitserve.grpc_errors import error_metadata

HEADER = "authorization"
_OPEN = "/grpc.health.v1.Health/Check"  # Watch is not: it would hold a stream


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls whose metadata holds no key of ``keyring``."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, or one that refuses."""
        if handler_call_details.method != _OPEN:
            try:
                self._keyring.tenant(authorization(handler_call_details.invocation_metadata))
            except Unauthenticated as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def authorization(metadata: Any) -> str | None:
    """The ``authorization`` entry of a call's metadata."""
    return next((str(value) for key, value in metadata or () if key == HEADER), None)


def _refusal(error: Unauthenticated) -> Any:
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message, error_metadata(error))

    return grpc.stream_stream_rpc_method_handler(refuse)  # reads nothing of the request
