"""How a process begins and ends, whatever it serves: configuration in, exit code out.

A parent passes the configuration as JSON in the environment, which other users of the machine can't read as they
can arguments: it may hold the password of Redis. Invariant: a wrong configuration gives one line on stderr (or for
the parent that waits to hear it) and exit code 1, never a traceback.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

import uvloop

from splitserve.api_keys import ApiKey
from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, TlsFiles, WorkerConfig
from splitserve.errors import ConfigError, EngineError, Unavailable

_Config = TypeVar("_Config", WorkerConfig, RouterConfig)
CONFIG_VARIABLE = "SPLITSERVE_PROCESS"
_PR_SET_PDEATHSIG = 1


def config_to_json(config: WorkerConfig | RouterConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def config_from_json(kind: type[_Config], text: str) -> _Config:
    """The inverse of `config_to_json`."""
    fields: dict[str, Any] = json.loads(text)
    fields["log"] = LogConfig(**fields["log"])
    fields["api_keys"] = tuple(ApiKey(**key) for key in fields["api_keys"])
    for name in ("tls", "public_tls"):
        if fields.get(name) is not None:
            fields[name] = TlsFiles(**fields[name])
    for name in ("transports", "cores", "spare_cores"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if "role" in fields:
        fields["role"] = Role(fields["role"])
    return kind(**fields)


def config_environment(config: WorkerConfig | RouterConfig) -> dict[str, str]:
    """This process's environment with the configuration of one that it starts or becomes."""
    return {**os.environ, CONFIG_VARIABLE: config_to_json(config)}


def run_process(kind: type[_Config], serve: Callable[[_Config], Coroutine[Any, Any, None]]) -> None:
    """Runs ``serve`` with the configuration that a parent left in the environment, and exits."""
    if CONFIG_VARIABLE not in os.environ:
        sys.exit("splitserve: this module is started by `splitserve router`, `prefill`, `decode` or `up`")
    config = config_from_json(kind, os.environ.pop(CONFIG_VARIABLE))
    if config.ready_fd is not None:
        end_with_parent()
    try:
        if isinstance(config, WorkerConfig) and config.cores:
            _run_on(config.cores)
        uvloop.run(serve(config))
    # Unavailable: Redis went away during the start, or another process took this one's place
    except (ConfigError, EngineError, Unavailable, ExceptionGroup) as error:
        _end_with(_reason(error), config.ready_fd)
    except KeyboardInterrupt:
        sys.exit(130)


def _reason(error: Exception) -> str:
    """In one line. Raises ``error`` again if it, or what a task group gathered, is more than a wrong start."""
    if isinstance(error, ExceptionGroup):
        return "; ".join(dict.fromkeys(_reason(each) for each in error.exceptions))
    if not isinstance(error, ConfigError | EngineError | Unavailable):
        raise error
    return error.message


def _end_with(reason: str, ready_fd: int | None) -> NoReturn:
    try:
        if ready_fd is not None:
            tell_parent(ready_fd, {"error": reason})
            sys.exit(1)
    except BrokenPipeError:
        pass  # the parent has stopped listening: it knows this process as one that serves
    sys.exit(f"splitserve: {reason}")


def tell_parent(ready_fd: int, message: Mapping[str, str]) -> None:
    """One line on the pipe to the parent. It stays open here: the parent closes its end when it has heard enough,
    and then BrokenPipeError is raised."""
    os.write(ready_fd, json.dumps(dict(message)).encode() + b"\n")


def _run_on(cores: Collection[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, ValueError, OverflowError) as error:
        allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ConfigError(f"cannot run on cores {', '.join(map(str, cores))}: there are {allowed}") from error


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
