"""The checksums of blocks, and which one two workers use.

CRC32C is what a CPU has an instruction for. The sum of mixed words is what a GPU computes as fast as it reads, in
any order (kernels/triton/transfer.py is the same function on a device); a CPU takes its time for it. Knows bytes.
Invariant: both notice any change of a single 32-bit word.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import crc32c
import numpy as np


class Checksum(enum.IntFlag):
    """As a HELLO names them."""

    CRC32C = 1
    WORDS = 2


def checksum_of(kind: Checksum, data: memoryview) -> int:
    """Of bytes in host memory; WORDS takes whole 32-bit words."""
    return crc32c.crc32c(data) if kind is Checksum.CRC32C else checksum_words(data)


def checksum_words(data: memoryview) -> int:
    """The sum of the mixed little-endian 32-bit words, each with its place added, modulo 2**32."""
    words = np.frombuffer(data, dtype="<u4")
    x = words + np.arange(1, len(words) + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return int(x.sum(dtype=np.uint32))


def all_of(kinds: Iterable[Checksum]) -> Checksum:
    """As one set of bits."""
    bits = Checksum(0)
    for kind in kinds:
        bits |= kind
    return bits


def first_common(mine: Iterable[Checksum], theirs: Checksum) -> Checksum | None:
    """The one that comes first here and that the other side has too."""
    return next((kind for kind in mine if kind in theirs), None)
