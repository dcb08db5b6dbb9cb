"""Frames that arrived and wait to be read; shared by the transports.

Invariant: what was put before the end is read before the end.
"""

from __future__ import annotations

import asyncio
from collections import deque

from kvtransfer.transport import MAX_WAITING_FRAMES


class Inbox:
    """One reader, one writer, on one event loop."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._end: Exception | None = None
        self._changed = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._frames) >= MAX_WAITING_FRAMES

    def put(self, frame: bytes) -> None:
        if self._end is None:
            self._frames.append(frame)
            self._changed.set()

    def end(self, error: Exception) -> None:
        """No frame comes any more; readers get ``error`` behind the last frame. The first end counts."""
        if self._end is None:
            self._end = error
            self._changed.set()

    async def get(self) -> bytes:
        """The next frame; the error given to ``end`` behind the last."""
        while not self._frames:
            if self._end is not None:
                raise type(self._end)(*self._end.args)
            self._changed.clear()
            await self._changed.wait()
        frame = self._frames.popleft()
        self._changed.set()
        return frame

    async def room(self) -> None:
        """Returns once the inbox is not full, or ended."""
        while self.full and self._end is None:
            self._changed.clear()
            await self._changed.wait()
