"""Names of full KV blocks: SHA-256 over the model's fingerprint, the salt and all token ids to the block's end.

Invariant: equal hashes mean equal contents on any worker, since a hash covers everything that the contents
depend on: the model and layout (the fingerprint), the tenant's salt, and all tokens from the sequence's start.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

BlockHash = bytes  # 32 bytes


class PrefixHasher:
    """Names the blocks of one sequence, in order, as its tokens become known."""

    def __init__(self, fingerprint: bytes, salt: str = "") -> None:
        # behind a root of fixed length no salt can pass for tokens
        root = hashlib.sha256(b"root" + fingerprint + salt.encode()).digest()
        self._sha256 = hashlib.sha256(root)  # of all blocks named so far

    def next_blocks(self, tokens: Sequence[int], block_tokens: int) -> list[BlockHash]:
        """Hashes of the next blocks, which ``tokens`` fill; those of a partial last block are left for later."""
        hashes, update, digest = [], self._sha256.update, self._sha256.digest
        packed = array("I", tokens)
        data, size = packed.tobytes(), block_tokens * packed.itemsize
        for (block,) in struct.iter_unpack(f"{size}s", data[: len(data) // size * size]):
            update(block)
            hashes.append(digest())
        return hashes
