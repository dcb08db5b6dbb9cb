"""Memory for what a step reads from one end to the other: weights and the KV pool.

In pages of 2 MiB where the system gives them on request (Linux, transparent huge pages "madvise" or "always"): the
processor then looks an address up once in 2 MiB, and its prefetching does not stop at every 4 KiB. Knows sizes, no
contents. Invariant: memory that nobody has written takes none of the machine's.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_CHUNK = 256 << 20
_ALIGN = 4096  # bytes


def zeros(num_bytes: int) -> Tensor:
    """``[num_bytes]`` uint8 that begin at a huge page."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    if sys.platform == "linux":
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + num_bytes]


class Arena:
    """Tensors one behind the other: small ones share pages. A chunk lives as long as any of its tensors."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """``[count]`` of ``dtype``."""
        size = count * dtype.itemsize
        if size > len(self._free):
            self._free = zeros(max(size, _CHUNK))
        taken, self._free = self._free[:size], self._free[-(-size // _ALIGN) * _ALIGN :]
        return taken.view(dtype)
