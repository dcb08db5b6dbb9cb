"""A worker that breaks at a named point, once, when a file next to its model says so.

``python -m tests.chaos.faulty_worker CONFIG`` is the real worker but for its engine, which looks for
``<worker id>.fault`` and ``<role>.fault`` (meant for the first of the role that comes there) at each step.
Points: ``prefill`` (the steps that compute more than one token of a sequence) and ``token`` (a token of that index
was sampled and is not yet told). Actions: ``kill`` and ``stop`` send a SIGKILL or SIGSTOP, ``hang`` never
ends the step, ``break`` fails the engine's thread, ``slow`` makes this and all later steps take longer.
A file ``poison`` names a prompt that kills whoever computes it, each time; ``<worker id>.link`` where others
reach a prefill worker's blocks. A SIGUSR1 makes a worker write down which blocks it owns: the truth that the
directory is compared with.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import decode_service.__main__ as decode
import prefill_service.__main__ as prefill
from engine import AsyncEngine, create_engine
from engine.config import EngineConfig
from engine.core import StepResult
from engine.weights import ModelFiles
from splitserve.cluster import Role
from splitserve.config import WorkerConfig
from splitserve.hashing import BlockHash
from splitserve.model_info import ModelDescription
from splitserve.process import run_process
from splitserve.worker import WorkerContext, run_worker
from tests.chaos.sick_engine import SickEngine

SLOW_SECONDS = 0.03  # more, for each step


@dataclass(frozen=True, slots=True)
class Fault:
    point: str  # "prefill" or "token"
    at: int  # which of them; prefill steps count from when the fault was armed
    action: str  # "kill", "stop", "hang", "break" or "slow"


def arm(model: str, target: str, fault: Fault) -> Path:
    """The worker, or the first one of the role, breaks when it comes to that point; the file is gone then."""
    path = Path(model).parent / f"{target}.fault"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(fault)))
    return fresh.rename(path)


def poison_file(model: str) -> Path:
    """While it exists, a prompt that begins with the tokens in it kills the engine that computes it."""
    return Path(model).parent / "poison"


def owned_file(model: str, worker: str) -> Path:
    """Where a worker writes its blocks, one hash a line."""
    return Path(model).parent / f"{worker}.blocks"


def link_file(model: str, worker: str) -> Path:
    """Holds the address that a prefill worker names, when it starts, instead of where its blocks really are."""
    return Path(model).parent / f"{worker}.link"


def relayed_file(model: str, worker: str) -> Path:
    """Where they really are."""
    return Path(model).parent / f"{worker}.relayed"


class FaultyEngine(SickEngine):
    def __init__(self, paths: list[Path], config: EngineConfig, files: ModelFiles) -> None:
        super().__init__(config, files)
        self._paths = paths
        self._prefills = 0
        self._thread_fails = False
        self._slow = False
        self._poison = poison_file(config.model)

    def step(self) -> StepResult:
        if self._slow:
            time.sleep(SLOW_SECONDS)
        if self._poisoned():
            os.kill(os.getpid(), signal.SIGKILL)
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

    def _poisoned(self) -> bool:
        with suppress(FileNotFoundError):
            tokens = json.loads(self._poison.read_text())
            sequences = (*self.scheduler.running, *self.scheduler.waiting)
            return any(s.tokens[: len(tokens)] == tokens and not s.loads for s in sequences)
        return False

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
            "slow": lambda: setattr(self, "_slow", True),
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
    make_role = _make_prefill if config.role is Role.PREFILL else decode.make_role
    loop = asyncio.get_running_loop()

    def load(config: WorkerConfig) -> tuple[AsyncEngine, ModelDescription]:
        engine, description = create_engine(config, make)
        write = functools.partial(_write_owned, engine, owned_file(config.model, str(config.worker_id)))
        loop.call_soon_threadsafe(loop.add_signal_handler, signal.SIGUSR1, write)
        return engine, description

    await run_worker(config, load, make_role)  # type: ignore[arg-type]


def _make_prefill(context: WorkerContext, engine: AsyncEngine) -> prefill.PrefillRole:
    role = prefill.make_role(context, engine)
    model, worker = context.config.model, str(context.config.worker_id)
    start = role.start

    async def start_behind_link() -> Mapping[str, str]:
        addresses = await start()
        assert isinstance(addresses, dict)  # the one that handles are made from
        relayed_file(model, worker).write_text(addresses["tcp"])
        addresses["tcp"] = link_file(model, worker).read_text()
        return addresses

    if link_file(model, worker).exists():
        role.start = start_behind_link  # type: ignore[method-assign]
    return role


def _write_owned(engine: AsyncEngine, path: Path) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(name.hex() + "\n" for name in engine.known_hashes()))
    fresh.rename(path)


if __name__ == "__main__":
    run_process(WorkerConfig, serve)
