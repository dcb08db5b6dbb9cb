"""Owns which KV blocks are free, who holds the others, and which contents can be found again by hash.

Knows block ids and hashes, no tensors and no requests. A block whose last holder leaves keeps its hash and its
contents until it is handed out again, so the free list is the prefix cache: least recently used first, the
tail of a sequence before its head.

Invariant: every block is either held (references > 0) or in the free list, never both (`check_integrity`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from splitserve.hashing import BlockHash


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockPool:
    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.reached = 0  # all blocks that were ever handed out lie below
        self._caching = caching
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._events: dict[BlockHash, bool] = {}  # filled (True) or evicted; the last word counts

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Blocks that hold the longest known prefix of ``hashes``. Takes no reference."""
        blocks: list[int] = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def free_after(self, acquired: Sequence[int]) -> int:
        """Blocks that would be free once ``acquired`` (found by `match`) were held."""
        return len(self._free) - sum(1 for block in acquired if self._references[block] == 0)

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more holder for blocks that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` blocks from the free list; what they held is forgotten. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} free")
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
            self.reached = max(self.reached, block + 1)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less. ``blocks`` is in sequence order; the tail becomes reusable before the head."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, name: BlockHash) -> None:
        """States that a held, full block has the contents ``name``. The first block of a name keeps it."""
        assert self._references[block] > 0
        if not self._caching or name in self._block_of or self._hash_of[block] is not None:
            return
        self._hash_of[block] = name
        self._block_of[name] = block
        self._events[name] = True

    def take_events(self) -> dict[BlockHash, bool]:
        """What became findable (True) or ceased to be (False) since the last call."""
        events, self._events = self._events, {}
        return events

    def known_hashes(self) -> list[BlockHash]:
        """Everything that the pool can offer by hash now."""
        return list(self._block_of)

    def check_integrity(self) -> None:
        """Asserts the invariants; meant for tests and for an idle engine."""
        held = [b for b, count in enumerate(self._references) if count > 0]
        assert all(count >= 0 for count in self._references)
        assert len(held) + len(self._free) == self.num_blocks, "a block was lost or is held and free"
        assert not any(block in self._free for block in held)
        named = {b: h for b, h in enumerate(self._hash_of) if h is not None}
        assert {h: b for b, h in named.items()} == self._block_of

    def _forget(self, block: int) -> None:
        name = self._hash_of[block]
        if name is not None:
            self._hash_of[block] = None
            del self._block_of[name]
            self._events[name] = False
