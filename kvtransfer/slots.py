"""Buffers of one size that payloads pass through, kept and lent again; one object serves all connections.

Knows no pool. Invariant: a slot is free or taken, and belongs to whoever took it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Slot = TypeVar("Slot")


class Slots(Generic[Slot]):
    def __init__(self, slots: Sequence[Slot], more: Callable[[], Sequence[Slot]] | None = None) -> None:
        """``more`` makes some where none is free; without it there are only ``slots``."""
        self.made = len(slots)  # without those of ``more``
        self._free = list(slots)
        self._more = more
        self._returned = asyncio.Event()

    @property
    def num_free(self) -> int:
        return len(self._free)

    async def take(self) -> Slot:
        """Waits for one if there are no more."""
        while not self._free:
            if self._more is not None:
                self._free.extend(self._more())
            else:
                self._returned.clear()
                await self._returned.wait()
        return self._free.pop()

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot)
        self._returned.set()
