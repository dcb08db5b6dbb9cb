"""The errors that users and peers see, as one tree.

    SplitServeError
    ├── InvalidRequest        the client must change the request   INVALID_ARGUMENT    400
    │   └── RequestTooLarge   a size limit was passed              INVALID_ARGUMENT    413
    ├── Unauthenticated       no or a wrong API key                UNAUTHENTICATED     401
    ├── NotFound              no such model, path, transfer        NOT_FOUND           404
    ├── Overloaded            queues are full: try again later     RESOURCE_EXHAUSTED  429
    ├── Unavailable           no worker, or it went away           UNAVAILABLE         503
    │   ├── TransferFailed    KV blocks could not be fetched       UNAVAILABLE         503
    │   └── PeerLost          no connection to another process     UNAVAILABLE         503
    ├── DeadlineExceeded      the request's time is over           DEADLINE_EXCEEDED   504
    ├── Incompatible          peer with another model or layout    FAILED_PRECONDITION 503
    ├── ConfigError           a flag, file or address is wrong     (exit code 1 at start)
    └── EngineError           the engine failed on this request    INTERNAL            500

Bugs of our own are assertions, not members of this tree.
"""

from __future__ import annotations

from typing import ClassVar


class SplitServeError(Exception):
    """Root of the tree. ``grpc_status`` is the name of a ``grpc.StatusCode``; ``told`` stands in for messages
    that name workers, addresses and other insides, which clients must not learn."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"
    told: ClassVar[str | None] = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def public(self) -> str:
        """What a client may read; the log has the message."""
        return self.message if self.told is None else self.told


class InvalidRequest(SplitServeError):
    """The request can never be served as it is; ``field`` names what to change."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestTooLarge(InvalidRequest):
    """A size limit was passed."""

    http_status = 413


class Unauthenticated(SplitServeError):
    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    kind = "authentication_error"


class NotFound(SplitServeError):
    grpc_status = "NOT_FOUND"
    http_status = 404
    kind = "not_found_error"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class _RetryLater(SplitServeError):
    """``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(_RetryLater):
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    kind = "overloaded_error"


class Unavailable(_RetryLater):
    grpc_status = "UNAVAILABLE"
    http_status = 503
    kind = "service_unavailable_error"


class TransferFailed(Unavailable):
    """``reason`` is one of a small set of words, used as a metric label; ``blocks_received`` is how many leading
    blocks did arrive and are good."""

    told = "the KV blocks of this request could not be fetched; try again"

    def __init__(self, message: str, reason: str, blocks_received: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.blocks_received = blocks_received


class PeerLost(Unavailable):
    """gRPC's own words about a connection, with addresses in them."""

    told = "a worker of this request went away; try again"


class DeadlineExceeded(SplitServeError):
    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504
    kind = "timeout_error"


class Incompatible(SplitServeError):
    grpc_status = "FAILED_PRECONDITION"
    http_status = 503
    kind = "service_unavailable_error"
    told = "no worker can serve this request as it is"


class ConfigError(SplitServeError):
    """Printed as one line; the process exits with code 1."""

    told = "internal error"


class EngineError(SplitServeError):
    """The engine could not go on with this request; others are not affected."""

    told = "the engine failed on this request"


BY_GRPC_STATUS: dict[str, type[SplitServeError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAUTHENTICATED": Unauthenticated,
    "NOT_FOUND": NotFound,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "FAILED_PRECONDITION": Incompatible,
}
