"""Conversations written out as prompts, by chat templates that nobody here has read.

Templates are programs from model files, and messages come from clients: together they may loop for ever or fill
the memory inside a single operation, which no thread can stop. So each template has a process of its own
(``router.render_process``), which the kernel ends when it uses too much time.

Owns these processes; knows no model and no HTTP. Invariant: a rendering delays the event loop and other templates
not at all, and later renderings of its own template for `Limits.seconds` of computing at most.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import orjson

from splitserve.errors import InvalidRequest
from splitserve.text import ChatTemplate

LENGTH = struct.Struct("<I")  # before each JSON message, in both directions
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TZ")  # not ours: it may hold a key

Messages = Sequence[Mapping[str, Any]]


class Renderer(Protocol):
    async def render(self, template: ChatTemplate, messages: Messages, add_generation_prompt: bool) -> str:
        """Raises ``InvalidRequest`` on ``messages``."""
        ...


class InlineRenderer:
    """For templates that are known to be harmless: renders here and now."""

    async def render(self, template: ChatTemplate, messages: Messages, add_generation_prompt: bool) -> str:
        return template.render(messages, None, add_generation_prompt)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may use, and how many processes are kept."""

    seconds: float = 1.0  # of computing
    wall_seconds: float = 15.0  # on a machine that has no time for it; the start of a process included
    memory_bytes: int = 2 * 2**30  # of address space, all that the process maps
    processes: int = 8


class ProcessRenderer:
    """Leave the block to end its processes."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._processes: dict[tuple[Any, ...], _RenderProcess] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            await process.end()

    async def render(self, template: ChatTemplate, messages: Messages, add_generation_prompt: bool) -> str:
        question = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        key = (template.source, *sorted(template.special_tokens.items()))
        if key not in self._processes:
            await self._make_room()
        process = self._processes.setdefault(key, _RenderProcess(template, self._limits))
        answer = await process.ask(orjson.dumps(question))
        if "refusal" in answer:
            raise InvalidRequest(answer["refusal"], "messages")
        return str(answer["text"])

    async def _make_room(self) -> None:
        """Ends the oldest processes that are idle, so that a new one is not one too many."""
        idle = [key for key, process in self._processes.items() if not process.busy]
        for key in idle[: max(0, len(self._processes) - self._limits.processes + 1)]:
            await self._processes.pop(key).end()


class _RenderProcess:
    """The process of one template, started when there is something to render."""

    def __init__(self, template: ChatTemplate, limits: Limits) -> None:
        self._setup = orjson.dumps(
            {
                "source": template.source,
                "special_tokens": template.special_tokens,
                "max_chars": template.max_chars,
                "seconds": limits.seconds,
                "memory_bytes": limits.memory_bytes,
            }
        )
        self._limits = limits
        self._longest_answer = 8 * template.max_chars + 1024  # JSON writes a character with 6 bytes at most
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def busy(self) -> bool:
        return self._turn.locked()

    async def ask(self, question: bytes) -> dict[str, Any]:
        """Raises ``InvalidRequest`` when the process ended over it."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._limits.wall_seconds):
                    if self._process is None:
                        self._process = await _start()
                        await self._say(self._setup)
                    await self._say(question)
                    answer = await self._hear()
            except (ConnectionError, asyncio.IncompleteReadError):
                status = await self.end()
                seconds = f"{self._limits.seconds:g} s"
                raise InvalidRequest(
                    f"the chat template did not end within {seconds}"
                    if status == -signal.SIGPROF
                    else "the chat template failed on these messages",
                    "messages",
                ) from None
            except TimeoutError:
                await self.end()
                raise InvalidRequest("the chat template took too long", "messages") from None
            except BaseException:
                await self.end()  # else the next question would hear this one's answer
                raise
            return answer

    async def end(self) -> int | None:
        """Kills the process if it runs; its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        if process.returncode is None:
            with suppress(ProcessLookupError):
                # asyncio's own kill() asks for the status, which its waiter then never hears (CPython issue 87744)
                os.kill(process.pid, signal.SIGKILL)
        status = await process.wait()
        assert process.stdin is not None
        process.stdin.close()
        return status

    async def _say(self, message: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.writelines((LENGTH.pack(len(message)), message))
        await self._process.stdin.drain()

    async def _hear(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        if length > self._longest_answer:
            raise ConnectionError(f"an answer of {length} bytes")
        answer: dict[str, Any] = orjson.loads(await self._process.stdout.readexactly(length))
        return answer


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "router.render_process",
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the router's to hear
    )
