"""Makes the KV pool's memory resident before it is written.

The system gives memory page by page at the first touch, which costs a prefill step or an arriving transfer up to a
fifth of its time. A thread of the lowest priority does it ahead of the blocks that are handed out. Knows addresses
only. Invariant: what the memory holds is never changed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading

log = logging.getLogger(__name__)

AHEAD = 512 << 20  # bytes behind the highest block that was handed out
AFTER = 2.0  # seconds: meanwhile other workers of this machine get ready, whom a busy memory would hold up
_PIECE = 2 << 20  # bytes made resident by one call of the system: one huge page
_NICE = 19
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class PagesAhead:
    """Keeps ``ahead`` bytes of ``memory``, which begins at a page, resident behind what was reached.

    Begins ``after`` seconds, or once half of these bytes are in use."""

    def __init__(self, memory: memoryview, ahead: int = AHEAD, after: float = AFTER) -> None:
        self._memory = memory  # kept: the thread has its address
        self._size = memory.nbytes
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._ahead = ahead
        self._after = after
        self._done = 0
        self._wanted = min(ahead, self._size)
        self._more = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="pages", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reach(self, end: int) -> None:
        """The first ``end`` bytes are in use or were. Cheap: for every step."""
        if end + self._ahead // 2 > self._wanted < self._size:
            self._wanted = min(end + self._ahead, self._size)
            self._more.set()

    def close(self) -> None:
        self._ending = True
        self._more.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.platform != "linux":
            return
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._more.wait(self._after)
        while not self._ending:
            length = min(_PIECE, self._wanted - self._done)
            if length <= 0:
                self._more.wait()
                self._more.clear()
            elif madvise(self._address + self._done, length, _MADV_POPULATE_WRITE) == 0:
                self._done += length
            else:  # an older Linux, or no memory left: pages come at their first touch
                log.info("KV pages are not made resident ahead: %s", os.strerror(ctypes.get_errno()))
                return
