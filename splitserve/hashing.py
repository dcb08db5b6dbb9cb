"""Names of full KV blocks: a chain of SHA-256 over the model's fingerprint, the salt and the token ids.

Invariant: equal hashes mean equal contents on any worker, since a hash covers everything that the contents
depend on: the model and layout (the root), the tenant's salt, and all tokens from the start of the sequence.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

BlockHash = bytes  # 32 bytes


def chain_root(fingerprint: bytes, salt: str = "") -> BlockHash:
    """Parent of a sequence's first block."""
    return hashlib.sha256(b"root" + fingerprint + salt.encode()).digest()


def child_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name of the block that holds ``tokens`` behind the block named ``parent``."""
    return hashlib.sha256(parent + array("I", tokens).tobytes()).digest()


def block_hashes(root: BlockHash, tokens: Sequence[int], block_tokens: int) -> list[BlockHash]:
    """Hashes of the full blocks of ``tokens``, in order; a partial last block has none."""
    hashes, parent, sha256 = [], root, hashlib.sha256
    packed = array("I", tokens)
    data, size = packed.tobytes(), block_tokens * packed.itemsize
    for (block,) in struct.iter_unpack(f"{size}s", data[: len(data) // size * size]):
        parent = sha256(parent + block).digest()
        hashes.append(parent)
    return hashes
