"""Processes of a local cluster, started and ended by one parent.

A child says that it is ready and where it can be reached, or why it could not start, by one JSON line on a pipe
that it inherits, so nobody polls. Owns the processes; knows their configurations only as something to pass on.
Invariant: leaving the block leaves no process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from splitserve.config import RouterConfig, WorkerConfig
from splitserve.errors import ConfigError
from splitserve.process import config_environment, tell_parent

_KILL_AFTER = 5.0  # seconds behind the child's own drain timeout
_NICER = 5  # than their parent: a third of the weight
_TRIES = 20  # to say so to the system
_MODULES = {"prefill": "prefill_service", "decode": "decode_service"}


class Child:
    """One process of the cluster. ``module`` is what it runs; default: the service of its configuration."""

    def __init__(
        self,
        name: str,
        config: WorkerConfig | RouterConfig,
        log_dir: Path | None = None,
        module: str | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.module = module or (_MODULES[config.role] if isinstance(config, WorkerConfig) else "router")
        self.addresses: Mapping[str, str] = {}  # filled by `ready`
        self._log_dir = log_dir
        self._process: asyncio.subprocess.Process | None = None
        self._pipe: asyncio.StreamReader | None = None
        self._transport: asyncio.BaseTransport | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.returncode

    @property
    def log_path(self) -> Path | None:
        return None if self._log_dir is None else self._log_dir / f"{self.name}.log"

    async def start(self) -> None:
        reading, writing = os.pipe()
        stderr = None if self.log_path is None else self.log_path.open("ab")
        try:
            self._process = await self._spawn(
                config_environment(replace(self.config, ready_fd=writing)), writing, stderr
            )
        finally:
            os.close(writing)
            if stderr is not None:
                stderr.close()
        if isinstance(self.config, WorkerConfig):
            with contextlib.suppress(ProcessLookupError):  # ended already: `ready` tells why
                os.setpriority(os.PRIO_PROCESS, self.pid, _worker_niceness())
        self._pipe = asyncio.StreamReader()
        self._transport, _protocol = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._pipe),  # type: ignore[arg-type]
            os.fdopen(reading, "rb", 0),
        )

    async def _spawn(
        self, environment: dict[str, str], ready_fd: int, output: IO[bytes] | None
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            self.name,  # for whoever reads a list of processes
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(ready_fd,),
            start_new_session=True,  # Ctrl-C is the parent's to hear
        )

    async def ready(self, timeout: float) -> Mapping[str, str]:
        """Waits until the process serves; its addresses. Raises ConfigError, with the child's own words where it
        had any, if it ends or takes too long."""
        assert self._pipe is not None and self._transport is not None
        if isinstance(self.config, WorkerConfig):
            await _calm_group(self.pid)
        try:
            async with asyncio.timeout(timeout):
                line = await self._pipe.readline()
        except TimeoutError:
            raise ConfigError(f"{self.name} was not ready within {timeout:.0f} s") from None
        if not line:
            code = await self.wait()
            where = "" if self.log_path is None else f"; see {self.log_path}"
            raise ConfigError(f"{self.name} ended with exit code {code} before it was ready{where}")
        self._transport.close()  # from now on it tells its own stderr what goes wrong
        message = json.loads(line)
        if "error" in message:
            raise ConfigError(f"{self.name}: {message['error']}")
        self.addresses = message
        return self.addresses

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # asyncio's own asks for the status, which its waiter then never hears (CPython issue 87744)
                os.kill(self._process.pid, number)

    async def stop(self) -> int:
        """SIGTERM, time to drain, SIGKILL. Returns the exit code."""
        if self._process is None:
            return 0
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.config.drain_timeout + _KILL_AFTER):
                return await self.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self.wait()
        finally:
            if self._transport is not None:
                self._transport.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _worker_niceness() -> int:
    """Workers share the machine's cores with the router, which needs little of them, but at once."""
    return min(os.getpriority(os.PRIO_PROCESS, 0) + _NICER, 19)


async def _calm_group(pid: int) -> None:
    """Where Linux groups processes by session, the group's niceness is what counts between groups."""
    for _ in range(_TRIES):
        try:
            _write(Path(f"/proc/{pid}/autogroup"), str(_worker_niceness()))
        except BlockingIOError:  # whoever is not root may change one group in a tenth of a second
            await asyncio.sleep(0.1)
        except OSError:  # there are no groups, or the process has ended
            return
        else:
            return


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def tell_ready(ready_fd: int | None, addresses: Mapping[str, str]) -> None:
    """The child's side: tells the parent, if there is one that asked, that it serves at ``addresses``."""
    if ready_fd is not None:
        tell_parent(ready_fd, addresses)
