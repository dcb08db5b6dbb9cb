"""An engine that is slow, or that fails requests, while files next to its model say so.

``pace`` holds seconds that each step takes at least, without using the processor: a machine of known speed.
While ``failing`` exists no step can be computed. A sequence that begins with ``NOT_FINITE`` or ``EXPLODES`` has
logits that are not finite, or makes its step raise, once it has generated two tokens. ``PID.calls`` gets a letter
for each request that comes to an engine: ``p`` to be read for another worker, ``d`` to be answered.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from engine import Engine, EngineRequest
from engine.config import EngineConfig
from engine.runner import Launched
from engine.scheduler import Scheduled
from engine.weights import ModelFiles

NOT_FINITE = (250, 251, 250, 251)
EXPLODES = (251, 250, 251, 250)


def pace_file(model: str) -> Path:
    return Path(model).parent / "pace"


def failing_file(model: str) -> Path:
    return Path(model).parent / "failing"


def calls(model: str) -> Counter[str]:
    """How many requests have come to all engines so far, by letter."""
    return Counter("".join(path.read_text() for path in Path(model).parent.glob("*.calls")))


class SickEngine(Engine):
    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        super().__init__(config, files)
        self._pace = pace_file(config.model)
        self._failing = failing_file(config.model)
        self._calls = Path(config.model).parent / f"{os.getpid()}.calls"
        self._launch_well = self.runner.launch
        self.runner.launch = self._launch_sick  # type: ignore[method-assign]

    def add(self, request: EngineRequest, *, loads: bool = False) -> None:
        with self._calls.open("a") as file:
            file.write("p" if request.export else "d")
        super().add(request, loads=loads)

    def _launch_sick(self, scheduled: Sequence[Scheduled], before: Launched | None = None) -> Launched:
        with suppress(FileNotFoundError, ValueError):
            time.sleep(float(self._pace.read_text()))
        if self._failing.exists() or any(_has(item, EXPLODES) for item in scheduled):
            raise ArithmeticError("a fault that was asked for")
        launched = self._launch_well(scheduled, before)
        for row, sequence in enumerate(launched.sequences):
            if any(item.sequence is sequence and _has(item, NOT_FINITE) for item in scheduled):
                launched.logits[row] = torch.nan
        return launched


def _has(item: Scheduled, mark: tuple[int, ...]) -> bool:
    """Also in the middle of an answer, so that it has company."""
    sequence = item.sequence
    return tuple(sequence.tokens[: len(mark)]) == mark and sequence.num_generated >= 2
