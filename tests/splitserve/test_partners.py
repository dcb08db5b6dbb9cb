from __future__ import annotations

from collections.abc import Callable

import pytest

from splitserve import partners
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.grpc_server import GrpcServer
from splitserve.partners import ALONE, Partners

MakeWorker = Callable[..., WorkerInfo]


class Health:
    """What a server has been told."""

    def __init__(self) -> None:
        self.said: list[bool] = []

    async def ready(self) -> None:
        self.said.append(True)

    async def not_ready(self) -> None:
        self.said.append(False)


@pytest.fixture(autouse=True)
def at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partners, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(partners, "SECONDS_PER_WORKER", 0.0)


def watch(directory: Directory, info: WorkerInfo) -> tuple[Partners, list[str], list[bool]]:
    reasons: list[str] = []
    health = Health()
    server: GrpcServer = health  # type: ignore[assignment]
    return Partners(directory, info, server, reasons), reasons, health.said


async def test_a_prefill_worker_is_ready_only_while_a_decode_worker_of_its_model_is_listed(
    directory: Directory, make_worker: MakeWorker
) -> None:
    info = await directory.register(make_worker("prefill-0", Role.PREFILL))
    found, reasons, said = watch(directory, info)
    await found.look()
    await found.look()
    assert (reasons, said) == ([ALONE], [False])
    await directory.register(make_worker("other", Role.DECODE, fingerprint="ff" * 32))
    await found.look()
    assert reasons == [ALONE], "one of another model is none"
    partner = await directory.register(make_worker("decode-0", Role.DECODE))
    await found.look()
    assert (reasons, said) == ([], [False, True])
    await directory.unregister(partner)
    await found.look()
    assert (reasons, said) == ([ALONE], [False, True, False])


async def test_a_decode_worker_needs_nobody(directory: Directory, make_worker: MakeWorker) -> None:
    found, reasons, said = watch(directory, await directory.register(make_worker("decode-0", Role.DECODE)))
    await found.look()
    assert (reasons, said) == ([], [])
