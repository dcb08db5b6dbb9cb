"""Servers under test as child processes: started, waited for, weighed, ended.

Owns the process group it starts and ends nothing else. Invariant: when the ``with`` block is left the whole group
is gone, however it was left.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from splitserve.errors import ConfigError

_TERM_SECONDS = 2.0  # nobody waits for a server under test to drain; two end before a harness loses patience
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server, and how to see that it is ready."""

    name: str
    command: str  # split like a shell does; nothing else of a shell
    url: str
    health: str = "/health"  # answers 200 once requests can come
    cores: tuple[int, ...] = ()  # to run on; none: all
    start_seconds: float = 600.0  # at most
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Weight:
    """What a process group has used and holds."""

    cpu_seconds: float
    resident: Mapping[str, int]  # bytes by command line


class RunningServer:
    """Starts the server on entering the block, returns once it is ready. Raises ConfigError."""

    def __init__(self, spec: ServerCommand) -> None:
        self.spec = spec
        self.ready_seconds = 0.0  # from the start of the process
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="bench-", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> Self:
        spec, began = self.spec, time.perf_counter()
        here = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, spec.cores or here)  # a child inherits it
            self._process = subprocess.Popen(
                shlex.split(spec.command),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **spec.env},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"{spec.name}: cannot start {spec.command!r}: {error}") from error
        finally:
            os.sched_setaffinity(0, here)
        try:
            self._wait_until_ready(self._process, began + spec.start_seconds)
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Asks the group to end, and makes it."""
        if self._process is None:
            return
        process, self._process = self._process, None
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):  # what is left then is killed
            process.wait(_TERM_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        self._log.close()

    def weigh(self) -> Weight:
        """CPU and memory of all its processes by now. Raises ConfigError if it has ended."""
        assert self._process is not None, "not running"
        if (code := self._process.poll()) is not None:
            raise ConfigError(f"{self.spec.name} ended with exit code {code}:\n{self.log_tail()}")
        root = psutil.Process(self._process.pid)
        cpu, resident = 0.0, {}
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                cpu += times.user + times.system
                resident[f"{process.pid} {_title(process.cmdline())}"] = process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return Weight(cpu, resident)

    def log_tail(self, lines: int = 15) -> str:
        """The end of what it printed."""
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_ready(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        with httpx.Client(base_url=self.spec.url, timeout=5.0) as client:
            while time.perf_counter() < deadline:
                if (code := process.poll()) is not None:
                    raise ConfigError(f"{self.spec.name} ended with exit code {code}:\n{self.log_tail()}")
                try:
                    if client.get(self.spec.health).status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                time.sleep(_POLL_SECONDS)
        raise ConfigError(
            f"{self.spec.name} was not ready within {self.spec.start_seconds:g} s:\n{self.log_tail()}"
        )


def end_in_order() -> None:
    """Makes SIGTERM end this process like Ctrl-C does, so that servers are ended with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _title(command: Sequence[str]) -> str:
    return " ".join(command)[:60] or "?"
