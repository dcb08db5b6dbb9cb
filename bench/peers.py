"""The servers of a comparison, read from a TOML file (``bench/peers.example.toml``). Starts nothing."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.servers import ServerCommand
from splitserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare, as the file names it."""

    name: str
    command: str  # {port} and {python} are filled in
    model: str = "smollm2"
    url: str = "http://127.0.0.1:{port}"
    health: str = "/health"
    prompt_form: str = "tokens"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    workloads: tuple[str, ...] = ()  # none: all
    request_timeout: float = 600.0  # seconds
    start_timeout: float = 600.0
    prompts: float = 1.0  # times as many requests as others get
    rounds: int | None = None  # at most; none: all
    stays: bool = False  # up between its rounds: one whose start is long and that idles without work
    note: str = ""

    def server(self, port: int, cores: tuple[int, ...]) -> ServerCommand:
        """How to start it on ``port``."""
        return ServerCommand(
            name=self.name,
            command=_filled(self.command, port),
            url=_filled(self.url, port),
            health=self.health,
            cores=cores,
            start_seconds=self.start_timeout,
        )

    def takes(self, workload: str) -> bool:
        return not self.workloads or workload in self.workloads


@dataclass(frozen=True, slots=True)
class Probe:
    """A command that measures itself and prints ``name: value unit`` lines."""

    name: str
    command: str

    def filled(self) -> str:
        return _filled(self.command, 0)


@dataclass(frozen=True, slots=True)
class Peers:
    servers: tuple[Peer, ...]  # ours first
    probes: tuple[Probe, ...] = ()
    note: str = ""  # what holds for all


def read_peers(path: Path) -> Peers:
    """Raises ConfigError for a file that can't be read or says what nobody knows."""
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if unknown := set(data) - {"server", "probe", "note"}:
        raise ConfigError(f"{path}: unknown table {', '.join(sorted(unknown))}")
    servers = tuple(_build(Peer, path, table) for table in data.get("server", ()))
    if not servers:
        raise ConfigError(f"{path} names no server")
    if len({server.name for server in servers}) != len(servers):
        raise ConfigError(f"{path}: two servers of one name")
    probes = tuple(_build(Probe, path, table) for table in data.get("probe", ()))
    return Peers(servers, probes, str(data.get("note", "")))


def _build(kind: Any, path: Path, table: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    if unknown := set(table) - known:
        raise ConfigError(
            f"{path}: unknown key {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _filled(text: str, port: int) -> str:
    filled = os.path.expandvars(text.replace("{port}", str(port)).replace("{python}", sys.executable))
    if "$" in filled:
        raise ConfigError(f"{text!r} names a variable that is not set")
    return filled
