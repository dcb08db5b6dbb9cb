"""A worker that breaks at a named point, once, when a file next to its model says so.

``python -m tests.chaos.faulty_worker CONFIG`` is the real worker but for its engine, which looks for
``<worker id>.fault`` and ``<role>.fault`` (meant for the first of the role that comes there) at each step.
Points: ``prefill`` (the steps that compute more than one token of a sequence) and ``token`` (a token of that index
was sampled and is not yet told). Actions: ``kill`` and ``stop`` send a SIGKILL or SIGSTOP, ``hang`` never
ends the step, ``break`` fails the engine's thread.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import decode_service.__main__ as decode
import prefill_service.__main__ as prefill
from engine import Engine, create_engine
from engine.config import EngineConfig
from engine.core import StepResult
from engine.weights import ModelFiles
from splitserve.cluster import Role
from splitserve.config import WorkerConfig
from splitserve.hashing import BlockHash
from splitserve.process import run_process
from splitserve.worker import run_worker


@dataclass(frozen=True, slots=True)
class Fault:
    point: str  # "prefill" or "token"
    at: int  # which of them; prefill steps count from when the fault was armed
    action: str  # "kill", "stop", "hang" or "break"


def arm(model: str, target: str, fault: Fault) -> Path:
    """The worker, or the first one of the role, breaks when it comes to that point; the file is gone then."""
    path = Path(model).parent / f"{target}.fault"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(fault)))
    return fresh.rename(path)


class FaultyEngine(Engine):
    def __init__(self, paths: list[Path], config: EngineConfig, files: ModelFiles) -> None:
        super().__init__(config, files)
        self._paths = paths
        self._prefills = 0
        self._thread_fails = False

    def step(self) -> StepResult:
        fault = self._armed()
        if fault is None:
            self._prefills = 0
            return super().step()
        if any(s.remaining > 1 for s in (*self.scheduler.running, *self.scheduler.waiting)):
            self._prefills += 1
            if fault.point == "prefill" and self._prefills > fault.at:
                self._act(fault)
        result = super().step()
        sampled = {token.index for _, output in result.outputs for token in output.tokens}
        if fault.point == "token" and fault.at in sampled:
            self._act(fault)
        return result

    def take_events(self) -> dict[BlockHash, bool]:
        if self._thread_fails:
            raise RuntimeError("a fault that was asked for")
        return super().take_events()

    def _armed(self) -> Fault | None:
        for path in self._paths:
            with suppress(FileNotFoundError):
                return Fault(**json.loads(path.read_text()))
        return None

    def _act(self, fault: Fault) -> None:
        if not any(_taken(path) for path in self._paths):
            return
        actions: dict[str, Callable[[], object]] = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "hang": lambda: threading.Event().wait(),
            "break": lambda: setattr(self, "_thread_fails", True),
        }
        actions[fault.action]()


def _taken(path: Path) -> bool:
    """Whether this process was the first to come to the point."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


async def serve(config: WorkerConfig) -> None:
    paths = [Path(config.model).parent / f"{target}.fault" for target in (config.worker_id, config.role)]
    make = functools.partial(FaultyEngine, paths)
    make_role = prefill.make_role if config.role is Role.PREFILL else decode.make_role
    await run_worker(config, lambda c: create_engine(c, make), make_role)  # type: ignore[arg-type]


if __name__ == "__main__":
    run_process(WorkerConfig, serve)
