"""The two checksums of blocks, and what two workers agree on.

CRC32C is what a CPU has an instruction for. The sum of mixed words is what a GPU computes as fast as it reads, in
any order (kernels/triton/transfer.py is the same function on a device). Knows bytes. Invariant: both notice any
change of a single 32-bit word.
"""

from __future__ import annotations

import numpy as np


def checksum_words(data: memoryview) -> int:
    """The sum of the mixed little-endian 32-bit words, each with its place added, modulo 2**32."""
    words = np.frombuffer(data, dtype="<u4")
    x = words + np.arange(1, len(words) + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return int(x.sum(dtype=np.uint32))
