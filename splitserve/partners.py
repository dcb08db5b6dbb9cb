"""Takes a prefill worker out of service while the directory lists nobody who could go on with its prompts.

Decode workers need no partner: they compute prompts, too. Knows the directory and a list of reasons; asks less
often the longer the list of workers is. Invariant: while Redis is away, what was last known stays.
"""

from __future__ import annotations

import logging
import time

from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.errors import Unavailable

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
SECONDS_PER_WORKER = 0.02  # a list of 1,000 workers is asked for every 20 seconds
ALONE = "the directory lists no decode worker for this model"


class Partners:
    def __init__(self, directory: Directory, info: WorkerInfo, not_ready: list[str]) -> None:
        self._directory = directory
        self._info = info
        self._not_ready = not_ready  # filled here
        self._next = time.monotonic() + LOOK_SECONDS  # when to look again
        self._met = False  # a partner; without, a cluster is being started

    async def look(self) -> None:
        """Cheap until it is time."""
        if self._info.role is not Role.PREFILL or time.monotonic() < self._next:
            return
        try:
            workers = [state.info for state in await self._directory.workers()]
        except Unavailable:
            return
        self._next = time.monotonic() + max(LOOK_SECONDS, SECONDS_PER_WORKER * len(workers))
        alone = not any(w.role is Role.DECODE and w.fingerprint == self._info.fingerprint for w in workers)
        self._met |= not alone
        if alone == (ALONE in self._not_ready):
            return
        if alone:
            log.log(logging.WARNING if self._met else logging.INFO, "not ready: %s", ALONE)
            self._not_ready.append(ALONE)
        else:
            log.info("ready again: a decode worker is listed")
            self._not_ready.remove(ALONE)
