"""The shape of a KV block: what two workers must agree on before a byte moves between them.

Invariant: equal fingerprints mean that a block copied byte for byte is the same block.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
PROTOCOL_VERSION = 3  # of what travels between workers, and of how blocks are named


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One block is ``[num_kv_heads, num_layers, 2, block_tokens, head_dim]`` elements, contiguous.

    Head-major, so that the shard of a tensor-parallel rank is one range of bytes (see ``head_range``).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = 16

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head in a block, over all layers."""
        return self.num_layers * 2 * self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_tokens

    def head_range(self, first: int, count: int) -> tuple[int, int]:
        """Offset and length in bytes of ``count`` KV heads inside a block."""
        assert first >= 0 and count > 0 and first + count <= self.num_kv_heads
        return first * self.head_bytes, count * self.head_bytes

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def describe(self) -> str:
        return (
            f"{self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_dim}, "
            f"{self.dtype}, {self.block_tokens} tokens a block"
        )

    def fingerprint(self, model_digest: str) -> bytes:
        """32 bytes that name model, layout and protocol; every block's hash begins with it."""
        text = f"splitserve/{PROTOCOL_VERSION}|{model_digest}|{self.describe()}"
        return hashlib.sha256(text.encode()).digest()
