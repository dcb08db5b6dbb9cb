"""Prompts that this router has sent to workers and whose blocks the directory may not know yet.

Owns no clock and no policy: blocks and workers are any hashable names, times are the caller's. A prompt counts as
owned by its worker until a time that the caller gives, when the worker's own claims have long arrived.
Invariant: what a worker is said to own of a prompt is a prefix of it (a block never ends before one behind it).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Generic, TypeVar

Block = TypeVar("Block", bound=Hashable)


class RecentPrompts(Generic[Block]):
    def __init__(self) -> None:
        self._ends: dict[Block, dict[str, float]] = {}  # block -> worker id -> until
        self._due: list[tuple[float, int, str, Sequence[Block]]] = []  # heap
        self._serial = count()

    def __len__(self) -> int:
        """Blocks that are remembered."""
        return len(self._ends)

    def add(self, worker: str, blocks: Sequence[Block], until: float) -> None:
        """``worker`` will own these leading blocks of a prompt; after ``until`` others must know."""
        for block in blocks:
            ends = self._ends.setdefault(block, {})
            ends[worker] = max(until, ends.get(worker, until))
        heapq.heappush(self._due, (until, next(self._serial), worker, blocks))

    def longest_prefix(self, blocks: Sequence[Block], now: float) -> dict[str, int]:
        """Leading blocks that each worker will own, of those that will own any."""
        self._forget(now)
        if not blocks:
            return {}
        return {worker: self._count(worker, blocks) for worker in self._ends.get(blocks[0], ())}

    def _count(self, worker: str, blocks: Sequence[Block]) -> int:
        owned, bound = 1, len(blocks)
        while owned < bound:
            middle = (owned + bound + 1) // 2
            if worker in self._ends.get(blocks[middle - 1], ()):
                owned = middle
            else:
                bound = middle - 1
        return owned

    def _forget(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            until, _, worker, blocks = heapq.heappop(self._due)
            for block in blocks:
                ends = self._ends.get(block)
                if ends is not None and ends.get(worker, until + 1) <= until:
                    del ends[worker]
                    if not ends:
                        del self._ends[block]


def either(known: Mapping[str, int], recent: Mapping[str, int]) -> dict[str, int]:
    """The larger of two counts of leading blocks, for each worker."""
    merged = dict(known)
    for worker, blocks in recent.items():
        merged[worker] = max(blocks, merged.get(worker, 0))
    return merged
