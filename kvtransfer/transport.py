"""What a transport must do: carry small frames in order, and payloads from one pool straight into another.

A transport knows no transfers and reads no frame. All of them pass
``tests/kvtransfer/test_transport_contract.py``.
Invariant: once ``Connection.close()`` has returned, no posted receive of that connection writes a byte and no
send reads one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from kvtransfer.access import Buffer

MAX_FRAME = 8192  # bytes; a longer one breaks the connection
MAX_SLOT = (1 << 22) - 1
MAX_WAITING_FRAMES = 256  # received and not yet read; a peer that sends more is held back or cut off


class Connection(ABC):
    """One connection between two processes. Use it from the event loop that made it."""

    transport: str  # name of the transport
    peer: str  # for logs
    lanes: str = ""  # what the bytes travel over, where the transport can tell
    carries_device_memory: bool = False  # payloads may be in a GPU's memory

    @abstractmethod
    async def send_frame(self, frame: bytes) -> None:
        """Queues 1 to ``MAX_FRAME`` bytes behind all earlier frames. ConnectionLost; ValueError on the size."""

    @abstractmethod
    async def recv_frame(self) -> bytes:
        """The next frame. Frames that came before the peer closed are still returned, then ConnectionLost.

        ProtocolError if the peer sent one that is too long. May be cancelled without loss."""

    @abstractmethod
    def send_payload(self, slot: int, data: Buffer) -> asyncio.Future[None]:
        """Sends ``data``, not empty, to the receive that the peer posts for ``slot``. The future ends when
        ``data`` may change; its exception: ConnectionLost. Cancelling it does not withdraw the send: only
        ``close()`` does.

        Slots are chosen by the callers, 0 to ``MAX_SLOT``, each used once in a transfer."""

    @abstractmethod
    def post_payload(self, slot: int, into: Buffer) -> asyncio.Future[None]:
        """Accepts the payload of ``slot`` straight into ``into``. The future ends when it is there.

        Its exceptions: ConnectionLost, ProtocolError (another size). Cancelling it does not withdraw the receive:
        only ``close()`` does."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the connection and everything posted on it. Idempotent. Frames that were sent but not yet
        received by the peer may be lost."""


class Listener(ABC):
    """Accepts connections until it is closed; ``address`` is what a puller connects to."""

    address: str  # "host:port"

    @abstractmethod
    async def close(self) -> None:
        """Stops accepting. Connections already accepted live on. Idempotent."""


class Transport(ABC):
    """Makes connections. One object serves all listeners and pulls of one event loop."""

    name: str

    @abstractmethod
    async def listen(self, host: str, on_connection: Callable[[Connection], None]) -> Listener:
        """Accepts on a free port of ``host``; each connection is handed over and owned by the callee. OSError."""

    @abstractmethod
    async def connect(self, address: str) -> Connection:
        """Connects to a listener's address. ConnectionLost. The caller sets the deadline; cancelling is safe."""

    async def close(self) -> None:
        """Gives back what listeners and connections shared; they are closed before."""
        return


def split_address(address: str) -> tuple[str, int]:
    """``"host:port"`` in two; ValueError if it is not one."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)
