"""A second host on this machine: a network namespace with a link of its own to us.

Needs root and iproute2; `why_not` says what is missing. Owns the namespace and its link, knows no cluster.
Invariant: leaving the block removes both.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from splitserve.children import Child

HERE, THERE = "10.213.77.1", "10.213.77.2"


def why_not() -> str | None:
    """Why no such host can be made here; None if it can."""
    if shutil.which("ip") is None:
        return "there is no iproute2"
    try:
        with Host() as host:
            _ip("netns", "exec", host.name, "true")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.decode().strip()}"
    return None


class Host(AbstractContextManager["Host"]):
    """``THERE``, reached from ``HERE``."""

    def __init__(self) -> None:
        self.name = f"splitserve-{os.getpid()}"
        self._link = f"ss{os.getpid() % 100_000}"

    def __enter__(self) -> Self:
        _ip("netns", "add", self.name)
        try:
            _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            _ip("addr", "add", f"{HERE}/30", "dev", self._link)
            _ip("link", "set", self._link, "up")
            for arguments in (("addr", "add", f"{THERE}/30", "dev", "eth0"), ("link", "set", "eth0", "up")):
                _ip("-n", self.name, *arguments)
            _ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ip("netns", "del", self.name)

    def cut(self) -> None:
        """Nothing gets through, and nobody is told: the other end is down, ours stays up."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def mend(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")

    @property
    def bytes_sent(self) -> int:
        """From here to there."""
        return int(Path(f"/sys/class/net/{self._link}/statistics/tx_bytes").read_text())

    def child(self, *arguments: Any) -> Child:
        """A `Child` that runs on this host."""
        return _ChildThere(self.name, *arguments)


class _ChildThere(Child):
    def __init__(self, namespace: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._namespace = namespace

    async def _spawn(
        self, environment: dict[str, str], ready_fd: int, output: IO[bytes] | None
    ) -> asyncio.subprocess.Process:
        """UCX would find that both hosts share their memory: it may use TCP only."""
        command = ("ip", "netns", "exec", self._namespace, sys.executable, "-m", self.module, self.name)
        return await asyncio.create_subprocess_exec(
            *command,
            env=environment | {"UCX_TLS": "tcp"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(ready_fd,),
            start_new_session=True,
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
