"""How many requests a router works on at once; one more is refused before any work begins.

Knows nothing of requests. Invariant: never more than ``limit`` inside, and leaving always gives the place back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from splitserve.errors import Overloaded


class RequestLimit:
    def __init__(self, limit: int) -> None:
        assert limit > 0
        self._limit = limit
        self._inside = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for the length of the block. Raises Overloaded when all are taken; never waits."""
        if self._inside >= self._limit:
            raise Overloaded(f"the router has {self._limit} requests at once already")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
