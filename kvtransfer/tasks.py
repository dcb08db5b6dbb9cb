"""Two patterns of structured concurrency that the standard library lacks. Knows nothing of transfers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


@contextlib.asynccontextmanager
async def running(coroutine: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Runs ``coroutine`` beside the body; behind the body it is cancelled and has ended."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        try:
            await ended(task)
        finally:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.debug("ended with its owner: %r", error)


async def ended(task: asyncio.Task[Any]) -> None:
    """Returns when ``task`` has ended, not before: a cancellation of the waiter is raised behind it."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def uninterrupted(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs ``coroutine`` to its end even if the caller is cancelled, which is then raised behind it."""
    task = asyncio.create_task(coroutine)
    await ended(task)
    return task.result()


def heard(future: asyncio.Future[T]) -> None:
    """A done callback for a future that nobody may await: its error is then nobody's."""
    if not future.cancelled():
        future.exception()
