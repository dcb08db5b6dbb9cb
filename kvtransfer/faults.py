"""What can go wrong with a transfer: the words for it, and the exceptions inside this package.

Callers of :class:`~kvtransfer.client.PullClient` never see these exceptions: they get
:class:`splitserve.errors.TransferFailed`, whose ``reason`` is a :class:`Reason`, or
:class:`splitserve.errors.Incompatible`.
"""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """Why a pull failed; a metric label."""

    CONNECT = "connect"  # no connection to the source, or no transport in common
    STALLED = "stalled"  # neither data nor a sign of life for the progress timeout
    CHECKSUM = "checksum"  # a block was damaged on its way, twice
    PEER_LOST = "peer_lost"  # the connection broke
    EXPIRED = "expired"  # the source does not know the transfer (any more)
    REFUSED = "refused"  # wrong secret or epoch
    SOURCE_FAILED = "source_failed"  # the source could not compute the blocks
    INCOMPATIBLE = "incompatible"  # another model, layout or protocol version
    PROTOCOL = "protocol"  # the peer broke the rules


class ConnectionLost(Exception):
    """The connection is closed or broken; no posted receive of it will be filled any more once it is closed."""


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow."""


class Refusal(Exception):
    """The transfer ends, for a reason that has a name; between two workers it travels as an ERROR frame."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
