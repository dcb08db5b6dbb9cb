"""Prefix caches of modelled workers, and one index over all of them.

Invariant: what a worker owns of a prompt is a prefix of it, since eviction takes the tail of a chain first: the
index names a worker for a block exactly while that worker's cache holds it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Index:
    """Who owns which block: what the directory knows."""

    def __init__(self) -> None:
        self._owners: dict[int, set[int]] = {}

    def add(self, block: int, worker: int) -> None:
        self._owners.setdefault(block, set()).add(worker)

    def remove(self, block: int, worker: int) -> None:
        owners = self._owners[block]
        owners.remove(worker)
        if not owners:
            del self._owners[block]

    def longest_prefix(self, blocks: Sequence[int]) -> dict[int, int]:
        """Leading blocks that each worker owns, of those that own any."""
        found: dict[int, int] = {}
        for count, block in enumerate(blocks, 1):
            owners = self._owners.get(block)
            if not owners:
                break
            going_on = [w for w in owners if count == 1 or found.get(w) == count - 1]
            if not going_on:
                break
            for worker in going_on:
                found[worker] = count
        return found


class PrefixCache:
    """Blocks that one worker holds beyond what live sequences need, the least recently used evicted first."""

    def __init__(self, worker: int, capacity: int, index: Index) -> None:
        self._worker = worker
        self._capacity = capacity
        self._index = index
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are here."""
        for count, block in enumerate(blocks):
            if block not in self._blocks:
                return count
        return len(blocks)

    def store(self, blocks: Sequence[int], room: int | None = None) -> None:
        """Holds a prompt's blocks, the first of them longest. ``room``: what live sequences leave of the pool."""
        for block in reversed(blocks):
            if block not in self._blocks:
                self._index.add(block, self._worker)
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        self.shrink(self._capacity if room is None else room)

    def shrink(self, room: int) -> None:
        """Evicts until at most ``room`` blocks are left."""
        while len(self._blocks) > max(0, room):
            block, _ = self._blocks.popitem(last=False)
            self._index.remove(block, self._worker)
