"""Watches over open legs: a worker that falls silent while it owes an answer is given up.

A killed process closes its connections; one that is stopped, or cut off, says nothing for ever. Owns how often a
worker has missed to answer; knows no request. Invariant: a worker is given up only after it has missed twice in a
row, so that neither one lost packet nor a pause of this router itself ends a leg.
"""

from __future__ import annotations

import asyncio
import logging

from router.legs import Channels

log = logging.getLogger(__name__)

_MISSES = 2
_PAUSE_SECONDS = 0.5  # between two looks at a worker that answers


class Vigil:
    """``silence_seconds``: how long a worker may be silent; it is noticed half a second later at most."""

    def __init__(self, channels: Channels, silence_seconds: float) -> None:
        self._channels = channels
        self._patience = silence_seconds / _MISSES
        self._misses: dict[str, int] = {}  # in a row, by address

    async def keep(self) -> None:
        """Asks all workers that have open legs, for ever."""
        while True:
            addresses = self._channels.in_use()
            self._misses = {address: self._misses.get(address, 0) for address in addresses}
            await asyncio.gather(*(self._ask(address) for address in addresses))
            if not any(self._misses.values()):
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _ask(self, address: str) -> None:
        if await self._channels.answers(address, self._patience):
            self._misses[address] = 0
            return
        self._misses[address] += 1
        if self._misses[address] >= _MISSES:
            self._misses[address] = 0
            count = self._channels.lose(address)
            log.warning("the worker at %s has fallen silent: %d legs given up", address, count)
