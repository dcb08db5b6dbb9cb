from __future__ import annotations

from collections.abc import Callable

import pytest

from splitserve import partners
from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.partners import ALONE, Partners

MakeWorker = Callable[..., WorkerInfo]


@pytest.fixture(autouse=True)
def at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partners, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(partners, "SECONDS_PER_WORKER", 0.0)


async def test_a_prefill_worker_is_ready_only_while_a_decode_worker_of_its_model_is_listed(
    directory: Directory, make_worker: MakeWorker
) -> None:
    info = await directory.register(make_worker("prefill-0", Role.PREFILL))
    reasons: list[str] = []
    found = Partners(directory, info, reasons)
    await found.look()
    await found.look()
    assert reasons == [ALONE]
    await directory.register(make_worker("other", Role.DECODE, fingerprint="ff" * 32))
    await found.look()
    assert reasons == [ALONE], "one of another model is none"
    partner = await directory.register(make_worker("decode-0", Role.DECODE))
    await found.look()
    assert reasons == []
    await directory.unregister(partner)
    await found.look()
    assert reasons == [ALONE]


async def test_a_decode_worker_needs_nobody(directory: Directory, make_worker: MakeWorker) -> None:
    reasons: list[str] = []
    await Partners(directory, await directory.register(make_worker("decode-0", Role.DECODE)), reasons).look()
    assert reasons == []
