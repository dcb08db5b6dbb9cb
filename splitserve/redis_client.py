"""A connection to Redis whose every call ends within a deadline, with one error for all that can go wrong.

Owns the connection pool and the loaded scripts; knows no key. Invariant: no call waits longer than
``timeout``, and while Redis does not answer one caller at a time finds out, the others are refused at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from splitserve import lua
from splitserve.config import TlsFiles
from splitserve.errors import ConfigError, Unavailable

T = TypeVar("T")
Arg = bytes | str | int | float

RETRY_SECONDS = 0.25  # between looks at a Redis that does not answer
MAX_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script and the digest by which Redis knows it."""

    text: str
    sha: str

    @classmethod
    def named(cls, name: str) -> Script:
        text = lua.source(name)
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """A script with its keys and arguments."""

    script: Script
    keys: Sequence[Arg]
    args: Sequence[Arg] = ()

    @property
    def command(self) -> tuple[Arg, ...]:
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)


def redacted(url: str) -> str:
    """The address in ``url`` without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class RedisClient:
    """Runs commands and scripts. ``url``: redis://, rediss:// or unix:// ; ``timeout`` in seconds a call.

    ``tls``: what a rediss:// connection shows and believes, unless the URL's query says otherwise.
    Raises ConfigError for a URL that is none; every call raises Unavailable when Redis fails or is silent.
    """

    def __init__(self, url: str, timeout: float, tls: TlsFiles | None = None) -> None:
        self.address = redacted(url)
        self._timeout = timeout
        self._silent = False
        self._retry_at = 0.0
        self._probing = False
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=timeout,
                protocol=2,
                # Our own deadline does it all. With this one redis-py would use asyncio.wait_for, which loses
                # cancellations before Python 3.12.
                socket_timeout=None,
                socket_connect_timeout=timeout,
                # A pooled connection that Redis has closed (it restarted) costs one silent second try.
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
                **(_tls_options(tls) if url.startswith("rediss://") else {}),
            )
        except ValueError as error:
            raise ConfigError(f"not a Redis URL: {self.address} (redis://, rediss:// or unix://)") from error
        self._redis: Any = Redis.from_pool(pool)

    async def connect(self) -> None:
        """Raises ConfigError with one line when Redis can't be reached or refuses us."""
        try:
            await self.execute("PING")
        except Unavailable as error:
            raise ConfigError(f"cannot use Redis at {self.address}: {error.message}") from error

    async def close(self) -> None:
        await self._redis.aclose()

    async def execute(self, *command: Arg) -> Any:
        """The reply to one command."""
        return await self._guarded(lambda: self._redis.execute_command(*command))

    async def run(self, call: ScriptCall) -> Any:
        """The reply of one script."""
        return (await self.run_all([call]))[0]

    async def run_all(self, calls: Sequence[ScriptCall], atomic: bool = False) -> list[Any]:
        """The replies of scripts that travel together; ``atomic``: nobody else's commands run in between.

        The calls must be idempotent: they are sent again when Redis does not know a script yet.
        """
        return await self._guarded(lambda: self._run_all(calls, atomic))

    async def _run_all(self, calls: Sequence[ScriptCall], atomic: bool) -> list[Any]:
        try:
            return await self._send([call.command for call in calls], atomic)
        except NoScriptError:
            loads = {call.script.sha: ("SCRIPT", "LOAD", call.script.text) for call in calls}
            await self._send(list(loads.values()))
            return await self._send([call.command for call in calls], atomic)

    async def _send(self, commands: Sequence[tuple[Arg, ...]], atomic: bool = False) -> list[Any]:
        if len(commands) == 1:  # a pipeline would take longer, and one command is atomic
            return [await self._redis.execute_command(*commands[0])]
        async with self._redis.pipeline(transaction=atomic) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute()
            return replies

    async def _guarded(self, call: Callable[[], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        if self._silent and (self._probing or loop.time() < self._retry_at):
            raise Unavailable(f"Redis at {self.address} does not answer")
        probe = self._silent
        self._probing |= probe
        try:
            async with asyncio.timeout(self._timeout):
                reply = await call()
        except (TimeoutError, RedisTimeoutError) as error:
            self._silent, self._retry_at = True, loop.time() + RETRY_SECONDS
            raise Unavailable(f"no answer within {self._timeout:g} s") from error
        except (RedisError, OSError) as error:
            self._silent = False
            raise Unavailable(f"{type(error).__name__}: {_one_line(error)}") from error
        finally:
            if probe:
                self._probing = False
        self._silent = False
        return reply


def _tls_options(files: TlsFiles | None) -> dict[str, Any]:
    options: dict[str, Any] = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    if files is not None:
        options |= {"ssl_certfile": files.cert, "ssl_keyfile": files.key, "ssl_ca_certs": files.ca}
    return options


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
