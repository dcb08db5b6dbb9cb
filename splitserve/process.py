"""How a process begins and ends, whatever it serves: configuration in, exit code out.

A parent passes the configuration as one JSON argument. Invariant: a wrong configuration gives one line on
stderr and exit code 1, never a traceback.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.errors import ConfigError, Unavailable

_Config = TypeVar("_Config", WorkerConfig, RouterConfig)
_PR_SET_PDEATHSIG = 1


def config_to_json(config: WorkerConfig | RouterConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def config_from_json(kind: type[_Config], text: str) -> _Config:
    """The inverse of `config_to_json`."""
    fields: dict[str, Any] = json.loads(text)
    fields["log"] = LogConfig(**fields["log"])
    for name in ("transports", "cores"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if "role" in fields:
        fields["role"] = Role(fields["role"])
    return kind(**fields)


def run_process(kind: type[_Config], serve: Callable[[_Config], Coroutine[Any, Any, None]]) -> None:
    """Runs ``serve`` with the configuration in ``argv[1]`` on the process's cores, and exits."""
    config = config_from_json(kind, sys.argv[1])
    if isinstance(config, WorkerConfig) and config.cores:
        os.sched_setaffinity(0, config.cores)
    if config.ready_fd is not None:
        end_with_parent()
    try:
        uvloop.run(serve(config))
    except (ConfigError, Unavailable) as error:  # Unavailable: Redis went away during the start
        sys.exit(f"splitserve: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and SIGINT, from now on."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


def end_with_parent() -> None:
    """Asks Linux for a SIGTERM when the parent ends, so that a killed parent leaves no orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
