"""Connections that have carried a transfer to its end and wait for the next one to the same source.

Knows addresses and nothing of transfers. Invariant: a connection is here, in a pull, or closed.
"""

from __future__ import annotations

import time

from kvtransfer.frames import Stamp
from kvtransfer.transport import Connection

MAX_IDLE = 4  # for one address; more pulls at a time make connections of their own
IDLE_SECONDS = 120.0


class IdleConnections:
    """The most recently used connection goes out first; those that waited too long are closed in passing."""

    def __init__(self) -> None:
        self._idle: dict[str, list[tuple[float, Connection, Stamp]]] = {}

    def take(self, address: str) -> tuple[Connection, Stamp] | None:
        """A connection, and the transfer whose ACK it may still bring."""
        waiting = self._idle.get(address)
        return waiting.pop()[1:] if waiting else None

    async def put(self, address: str, connection: Connection, last: Stamp) -> None:
        self._idle.setdefault(address, []).append((time.monotonic(), connection, last))
        await self._close_all_but(time.monotonic() - IDLE_SECONDS, MAX_IDLE)

    async def close(self) -> None:
        await self._close_all_but(float("inf"), 0)

    async def _close_all_but(self, since: float, most: int) -> None:
        """Keeps, for each address, the latest ``most`` that were put here after ``since``."""
        for address, waiting in list(self._idle.items()):
            kept = [entry for entry in waiting if entry[0] >= since][-most:] if most else []
            dropped = [entry[1] for entry in waiting if entry not in kept]
            self._idle[address] = kept
            if not kept:
                del self._idle[address]
            for connection in dropped:
                await connection.close()
