from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from splitserve.children import Child
from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.errors import ConfigError
from splitserve.process import config_environment, config_from_json, config_to_json


def test_configurations_survive_the_way_to_a_child() -> None:
    worker = WorkerConfig(Role.DECODE, "m", "redis://r", transports=("tcp",), cores=(0, 3), log=LogConfig("debug"))
    router = RouterConfig("redis://r", port=1, log=LogConfig(json=True))
    assert config_from_json(WorkerConfig, config_to_json(worker)) == worker
    assert config_from_json(RouterConfig, config_to_json(router)) == router


async def test_a_child_that_cant_start_tells_its_parent_and_not_the_log(tmp_path: Path) -> None:
    child = Child("router", RouterConfig("redis://127.0.0.1:1", port=0, grpc_port=0), tmp_path)
    async with child:
        with pytest.raises(ConfigError, match=r"router: cannot use Redis at redis://127.0.0.1:1: "):
            await child.ready(30)
        assert await child.wait() == 1
    assert (tmp_path / "router.log").read_text() == ""


async def test_what_a_task_group_gathered_is_told_in_one_line() -> None:
    code = (
        "from splitserve.config import RouterConfig\n"
        "from splitserve.errors import ConfigError\n"
        "from splitserve.process import run_process\n"
        "async def serve(config):\n"
        "    inner = ExceptionGroup('', [ConfigError('no Redis')])\n"
        "    raise ExceptionGroup('two', [ConfigError('no port'), inner])\n"
        "run_process(RouterConfig, serve)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stderr=asyncio.subprocess.PIPE,
        env=config_environment(RouterConfig("")),
    )
    async with asyncio.timeout(30):
        _, said = await process.communicate()
    assert (process.returncode, said) == (1, b"splitserve: no port; no Redis\n")
