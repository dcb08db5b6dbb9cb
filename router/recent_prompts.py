"""Prompts that this router has sent to workers and whose blocks the directory may not know yet.

Owns no clock and no policy: blocks and workers are any hashable names, times are the caller's. A prompt counts as
owned by its worker until a time that the caller gives, when the worker's own claims have long arrived.
Invariant: what a worker is said to own of a prompt is a prefix of it (a block never ends before one behind it).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Generic, TypeVar

Block = TypeVar("Block", bound=Hashable)


class RecentPrompts(Generic[Block]):
    def __init__(self) -> None:
        self._ends: dict[str, dict[Block, float]] = {}  # worker id -> block -> until
        self._due: list[tuple[float, int, str, Sequence[Block]]] = []  # heap
        self._serial = count()

    def __len__(self) -> int:
        """Blocks that are remembered, for each worker."""
        return sum(map(len, self._ends.values()))

    def add(self, worker: str, blocks: Sequence[Block], until: float) -> None:
        """``worker`` will own these leading blocks of a prompt; after ``until`` others must know."""
        ends = self._ends.setdefault(worker, {})
        # ends fall along a prompt, so those that are too early are its tail: one call for thousands of blocks
        first = bisect_left(range(len(blocks)), True, key=lambda i: ends.get(blocks[i], until - 1) < until)
        ends.update(dict.fromkeys(blocks[first:], until))
        heapq.heappush(self._due, (until, next(self._serial), worker, blocks))

    def longest_prefix(self, blocks: Sequence[Block], now: float) -> dict[str, int]:
        """Leading blocks that each worker will own, of those that will own any."""
        self._forget(now)
        if not blocks:
            return {}
        owners = [(worker, ends) for worker, ends in self._ends.items() if blocks[0] in ends]
        return {
            worker: bisect_left(blocks, True, key=lambda block, ends=ends: block not in ends)  # type: ignore[misc]
            for worker, ends in owners
        }

    def _forget(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            until, _, worker, blocks = heapq.heappop(self._due)
            ends = self._ends.get(worker, {})
            for block in blocks:
                if ends.get(block, until + 1) <= until:
                    del ends[block]
            if not ends:
                self._ends.pop(worker, None)


def either(known: Mapping[str, int], recent: Mapping[str, int]) -> dict[str, int]:
    """The larger of two counts of leading blocks, for each worker."""
    merged = dict(known)
    for worker, blocks in recent.items():
        merged[worker] = max(blocks, merged.get(worker, 0))
    return merged
