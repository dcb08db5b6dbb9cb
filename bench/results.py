"""Results of a comparison on disk: a JSON file for each server, round and workload, there as soon as it is known.

Knows no meaning of figures. Invariant: a file that is there is whole, since it is written beside and renamed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench.machine import describe
from bench.report import save
from splitserve.errors import ConfigError

ERROR = "error"  # in place of a workload: why the server's round broke off


@dataclass(frozen=True, slots=True)
class Results:
    """The folder of one comparison."""

    folder: Path

    def facts(self, scale: float) -> dict[str, Any]:
        """When, where and how much was measured, as noted when the folder was begun. Raises ConfigError."""
        path = self.folder / "facts.json"
        if not path.exists():
            save(path, {"date": time.strftime("%Y-%m-%d"), "scale": scale, "machine": describe()})
        facts: dict[str, Any] = orjson.loads(path.read_bytes())
        if facts["scale"] != scale:
            raise ConfigError(f"{self.folder} holds results of --scale {facts['scale']:g}; take another folder")
        return facts

    def has(self, server: str, number: int, workload: str) -> bool:
        return self._path(server, number, workload).exists()

    def put(self, server: str, number: int, workload: str, figures: dict[str, Any]) -> None:
        path = self._path(server, number, workload)
        save(path.with_suffix(".part"), figures)
        path.with_suffix(".part").rename(path)

    def drop(self, server: str, number: int, workload: str) -> None:
        self._path(server, number, workload).unlink(missing_ok=True)

    def runs(self, server: str) -> list[dict[str, Any]]:
        """What there is of each round that has something, in order: figures by workload."""
        rounds: dict[int, dict[str, Any]] = {}
        for path in sorted(self._folder(server).glob("*.json")):
            number, _, workload = path.stem.partition("-")
            rounds.setdefault(int(number), {})[workload] = orjson.loads(path.read_bytes())
        return [rounds[number] for number in sorted(rounds)]

    def _folder(self, server: str) -> Path:
        return self.folder / re.sub(r"[^\w.-]+", "-", server)

    def _path(self, server: str, number: int, workload: str) -> Path:
        return self._folder(server) / f"{number}-{workload}.json"


def without_series(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same without what only a picture needs."""
    return [
        {
            workload: {key: value for key, value in figures.items() if key != "gaps"}
            for workload, figures in run.items()
        }
        for run in runs
    ]
