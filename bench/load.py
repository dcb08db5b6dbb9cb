"""Puts a load on a server and records what came back.

Owns pacing and the tasks of running conversations; knows no metrics. An open loop never waits for answers; what
it could not send in time is visible in ``Record.sent - Record.scheduled``.
Invariant: every turn that was begun becomes exactly one record, whatever happened to it; a conversation ends
with its first failure. Only a run that was ended by ``enough`` leaves turns without one: they are called off.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.datasets import Conversation, Turn
from bench.http_client import RequestFailed, Server, post_stream
from bench.openai_api import AnswerReader, Api, Past
from bench.record import Record


@dataclass(frozen=True, slots=True)
class Client:
    """Whom to ask, how, and how long to wait for one answer in seconds."""

    server: Server
    api: Api
    timeout: float = 600.0

    async def ask(self, history: Sequence[Past], turn: Turn, scheduled: float, label: str) -> tuple[Record, str]:
        """Sends one turn; returns what came of it and the text of the answer. Failures are in the record."""
        body = self.api.body(history, turn.prompt, turn.output_tokens)
        reader = AnswerReader()
        error = None
        sent = time.perf_counter()
        try:
            await post_stream(self.server, self.api.path, body, reader.read, self.timeout, _authorization())
            error = _shortcoming(reader, turn, self.api.ignore_eos)
        except RequestFailed as failure:
            error = str(failure)
        record = Record(
            scheduled=scheduled,
            sent=sent,
            ended=time.perf_counter(),
            arrivals=tuple(reader.arrivals),
            prompt_tokens=reader.prompt_tokens or len(turn.prompt) + sum(len(past.tokens()) for past in history),
            output_tokens=reader.output_tokens,
            cached_tokens=reader.cached_tokens,
            counted=reader.counted,
            label=label,
            error=error,
        )
        return record, reader.text


def _authorization() -> str:
    key = os.environ.get("OPENAI_API_KEY")
    return f"Authorization: Bearer {key}\r\n" if key else ""


def _shortcoming(reader: AnswerReader, turn: Turn, exact: bool) -> str | None:
    """Why an answer that came to its end is still none."""
    if not reader.arrivals:
        return "an answer without tokens"
    if not reader.finished:
        return "the stream ended without [DONE]"
    if exact and reader.counted and reader.output_tokens != turn.output_tokens:
        return f"{reader.output_tokens} tokens instead of {turn.output_tokens}"
    return None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A finished run."""

    records: tuple[Record, ...]  # in order of sending
    began: float  # seconds, the clock of the records
    duration: float  # seconds from the first schedule to the last end
    client_cpu: float  # seconds of CPU that this process used


class _Ended(Exception):
    """``enough`` said so; takes all running conversations along."""


async def run_load(
    client: Client,
    conversations: Sequence[Conversation],
    offsets: Sequence[float],
    max_concurrency: int | None = None,
    enough: Callable[[Record], bool] | None = None,
) -> LoadResult:
    """Starts conversation ``i`` at ``offsets[i]`` seconds, or later if ``max_concurrency`` are running.

    ``enough`` is asked after each request, and ends the run at once.
    """
    records: list[Record] = []
    room = asyncio.Semaphore(max_concurrency or max(1, len(conversations)))

    def keep(record: Record) -> None:
        records.append(record)
        if enough is not None and enough(record):
            raise _Ended

    with _no_collector():
        cpu, began = time.process_time(), time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                for conversation, offset in zip(conversations, offsets, strict=True):
                    due = began + offset
                    if (wait := due - time.perf_counter()) > 0:
                        await asyncio.sleep(wait)
                    await room.acquire()
                    tasks.create_task(_converse(client, conversation, due, keep, room))
        except* _Ended:
            pass
        cpu = time.process_time() - cpu
    ended = max((record.ended for record in records), default=began)
    return LoadResult(tuple(sorted(records, key=lambda record: record.sent)), began, ended - began, cpu)


async def _converse(
    client: Client, conversation: Conversation, due: float, keep: Callable[[Record], None], room: asyncio.Semaphore
) -> None:
    try:
        history: list[Past] = []
        for turn in conversation.turns:
            if turn.think:
                await asyncio.sleep(turn.think)
                due = time.perf_counter()
            record, answer = await client.ask(history, turn, due, conversation.label)
            keep(record)
            if record.error is not None:
                return
            history.append(Past(turn.prompt, answer, record.output_tokens))
            due = record.ended
    finally:
        room.release()


@contextmanager
def _no_collector() -> Iterator[None]:
    """A collection of garbage in the middle of a run would look like a pause of the server."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
