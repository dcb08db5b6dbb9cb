from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from splitserve.errors import ConfigError
from splitserve.redis_client import RedisClient
from splitserve.redis_server import PrivateRedis, find_redis_server

OWNER = """
import asyncio, sys
from pathlib import Path
from splitserve.redis_server import PrivateRedis

async def main():
    server = PrivateRedis(Path(sys.argv[1]))
    async with server:
        print(server.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def ends(pid: int) -> None:
    async with asyncio.timeout(30):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.02)


async def test_it_answers_and_ends_with_its_block(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path)
    async with server as url:
        client = RedisClient(url, 5.0)
        assert await client.execute("PING") is True
        await client.close()
        pid, socket = server.pid, server.socket
        assert url == f"unix://{socket}"
    await ends(pid)
    assert not socket.parent.exists()


async def test_only_this_user_reaches_it_and_only_by_its_socket(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path)
    async with server:
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
        kinds = {connection.family for connection in psutil.Process(server.pid).net_connections("inet")}
        assert kinds == set()


async def test_a_path_too_long_for_a_socket_still_works(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path / ("d" * 120))
    async with server:
        assert len(os.fsencode(server.socket)) < 104
        assert server.log_path.exists()


async def test_restarting_gives_an_empty_one_at_the_same_address(own_redis: PrivateRedis) -> None:
    client = RedisClient(own_redis.url, 5.0)
    await client.execute("SET", "key", "value")
    before = own_redis.url
    await own_redis.restart()
    assert own_redis.url == before
    assert await client.execute("GET", "key") is None
    await client.close()


async def test_a_binary_that_fails_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ended with status"):
        await PrivateRedis(tmp_path, binary=Path("/bin/false")).start()


async def test_what_a_failing_binary_says_is_passed_on(tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\necho cannot do this >&2\nexit 3\n")
    binary.chmod(0o755)
    with pytest.raises(ConfigError, match="ended with status 3: cannot do this"):
        await PrivateRedis(tmp_path, binary=binary).start()


async def test_the_wait_ends_when_redis_does(own_redis: PrivateRedis) -> None:
    os.kill(own_redis.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        assert await own_redis.wait() == -signal.SIGKILL


async def test_a_stopped_one_is_killed_in_the_end(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path, stop_seconds=0.1)
    await server.start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    await server.close()
    await ends(pid)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_it_ends_with_its_owner_however_that_ends(tmp_path: Path, ending: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(await asyncio.to_thread(owner.stdout.readline))
        owner.send_signal(ending)
        await asyncio.to_thread(owner.wait, 10)
    await ends(pid)


def test_the_server_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == binary
