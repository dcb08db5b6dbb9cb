"""Which blocks travel as one payload, as a message costs more than its bytes: those that lie behind each other in
both pools, or any where a side can copy them together.

Knows block ids and no bytes. Invariant: the lengths of `cut` add up to the blocks that were given.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.frames import MAX_JOINED


def joined(block_ids: Sequence[int], longest: int, anywhere: bool = False) -> bytes:
    """Bit ``i``, the lowest of a byte first: block ``i`` may come in one payload with block ``i - 1``, because it
    lies right behind it, or ``anywhere``. Ones behind each other join ``longest`` blocks at most."""
    bits = bytearray(min(-(-len(block_ids) // 8), MAX_JOINED))
    run = 1
    for i in range(1, min(len(block_ids), len(bits) * 8)):
        if run < longest and (anywhere or block_ids[i] == block_ids[i - 1] + 1):
            bits[i // 8] |= 1 << i % 8
            run += 1
        else:
            run = 1
    return bytes(bits)


def cut(
    block_ids: Sequence[int], first: int, joined: bytes, longest: int, anywhere: bool = False
) -> tuple[int, ...]:
    """Lengths of runs that ``joined`` allows, ``longest`` at most, and contiguous here unless ``anywhere``.

    ``first`` is the place of ``block_ids[0]`` in ``joined``."""
    runs: list[int] = []
    for i, block in enumerate(block_ids):
        place = first + i
        there = place < len(joined) * 8 and joined[place // 8] >> place % 8 & 1
        if i and there and (anywhere or block == block_ids[i - 1] + 1) and runs[-1] < longest:
            runs[-1] += 1
        else:
            runs.append(1)
    return tuple(runs)
