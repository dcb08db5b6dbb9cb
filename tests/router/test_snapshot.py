from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest

from router.breaker import Breakers, Trouble
from router.snapshot import ClusterView
from splitserve.cluster import Role, WorkerInfo, WorkerLoad
from splitserve.directory import Directory
from splitserve.redis_client import RedisClient
from splitserve.redis_server import PrivateRedis

MakeWorker = Callable[..., WorkerInfo]


@pytest.fixture
async def view(directory: Directory) -> AsyncIterator[ClusterView]:
    """A view that looks only when asked."""
    async with ClusterView(directory, refresh_seconds=3600) as view:
        yield view


async def eventually(check: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.01)


def ids(view: ClusterView) -> list[str]:
    return [state.info.id for state in view.states()]


def gone(view: ClusterView, worker: WorkerInfo) -> None:
    now = asyncio.get_running_loop().time()
    view.breakers.failed(worker, Trouble.GONE, now, now)


async def flush(url: str) -> None:
    client = RedisClient(url, 5.0)
    await client.execute("FLUSHALL")
    await client.close()


async def test_workers_that_join_and_leave_are_followed(directory: Directory, make_worker: MakeWorker) -> None:
    async with ClusterView(directory, refresh_seconds=0.02) as view:
        info = await directory.register(make_worker("d0"))
        await eventually(lambda: ids(view) == ["d0"])
        await directory.unregister(info)
        await eventually(lambda: ids(view) == [])


async def test_workers_that_come_one_after_the_other_are_seen_soon(
    directory: Directory, make_worker: MakeWorker
) -> None:
    async with ClusterView(directory, refresh_seconds=60) as view:
        assert view._pause() == 12
        await directory.register(make_worker("d0"))
        await view.refresh()
        assert view._pause() == 12
        view._changed_at -= 11
        assert view._pause() == 60


async def test_a_worker_whose_lease_ends_leaves(redis_url: str, make_worker: MakeWorker) -> None:
    async with Directory(redis_url, lease_seconds=1.0) as directory, ClusterView(directory, 0.02) as view:
        await directory.register(make_worker("d0"))
        await eventually(lambda: ids(view) == ["d0"])
        await eventually(lambda: ids(view) == [])


async def test_without_redis_the_last_known_workers_stay(
    own_redis: PrivateRedis, make_worker: MakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Directory(own_redis.url, lease_seconds=1.0, timeout=1.0) as directory,
        ClusterView(directory, 0.02) as view,
    ):
        await directory.register(make_worker("d0"))
        assert await view.refresh()
        os.kill(own_redis.pid, signal.SIGKILL)
        await own_redis.wait()
        await eventually(lambda: view.stale)
        await asyncio.sleep(1.2)
        assert ids(view) == ["d0"]
    assert caplog.text.count("is away") == 1


async def test_a_redis_that_lost_its_memory_takes_no_worker_away_within_its_lease(
    redis_url: str, make_worker: MakeWorker
) -> None:
    async with Directory(redis_url, lease_seconds=1.5) as directory, ClusterView(directory, 3600) as view:
        info = await directory.register(make_worker("d0"))
        await directory.register(make_worker("d1"))
        await view.refresh()
        await flush(redis_url)
        assert await view.refresh()
        assert ids(view) == ["d0", "d1"]
        while ids(view) != ["d0"]:
            await directory.heartbeat(info, WorkerLoad())
            await asyncio.sleep(0.1)
            await view.refresh()
            assert "d0" in ids(view)


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "the same"])
async def test_a_redis_that_is_back_takes_no_worker_away_before_it_could_say_that_it_lives(
    own_redis: PrivateRedis, make_worker: MakeWorker, empty: bool
) -> None:
    """Redis was away for longer than a lease: nobody could renew one."""
    async with (
        Directory(own_redis.url, lease_seconds=0.5, timeout=0.2) as directory,
        ClusterView(directory, 3600) as view,
    ):
        info = await directory.register(make_worker("d0"))
        await directory.register(make_worker("d1"))
        await view.refresh()
        os.kill(own_redis.pid, signal.SIGKILL if empty else signal.SIGSTOP)
        assert not await view.refresh()
        await asyncio.sleep(0.7)
        await own_redis.restart() if empty else os.kill(own_redis.pid, signal.SIGCONT)
        while not await view.refresh():
            await asyncio.sleep(0.02)
        assert ids(view) == ["d0", "d1"]
        await asyncio.sleep(0.6)
        await directory.heartbeat(info, WorkerLoad())
        await view.refresh()
        assert ids(view) == ["d0"]


async def test_a_view_starts_without_redis(make_worker: MakeWorker) -> None:
    directory = Directory("redis://127.0.0.1:1")
    async with ClusterView(directory) as view:
        assert view.stale
        assert view.models() == {}
    await directory.close()


async def test_a_failed_worker_is_left_alone_for_a_while(directory: Directory, make_worker: MakeWorker) -> None:
    async with ClusterView(directory, 3600, Breakers(eject_seconds=1.0)) as view:
        info = await directory.register(make_worker("d0"))
        await view.refresh()
        gone(view, info)
        assert view.pool("tiny") is None
        await view.refresh()
        assert view.pool("tiny") is None
        await eventually(lambda: view.pool("tiny") is not None)


async def test_a_new_incarnation_does_not_inherit_the_failure(
    directory: Directory, view: ClusterView, make_worker: MakeWorker
) -> None:
    old = await directory.register(make_worker("d0"))
    await view.refresh()
    gone(view, old)
    await directory.register(make_worker("d0"))
    await view.refresh()
    assert view.pool("tiny") is not None


async def test_requests_in_flight_count_until_the_worker_tells_of_them(
    directory: Directory, view: ClusterView, make_worker: MakeWorker
) -> None:
    info = await directory.register(make_worker("p0", Role.PREFILL))
    await directory.heartbeat(info, WorkerLoad(num_waiting=1, queued_tokens=100, used_blocks=5))
    await view.refresh()
    [state] = view.states()
    with view.begin(state, tokens=512, blocks=32), view.begin(state, tokens=8, blocks=1):
        [state] = view.states()
        assert (state.load.num_waiting, state.load.queued_tokens, state.load.used_blocks) == (3, 620, 38)
        await asyncio.sleep(0.01)
        await directory.heartbeat(info, WorkerLoad(num_running=2, queued_tokens=600))
        await view.refresh()
        [state] = view.states()
        assert (state.load.num_waiting, state.load.queued_tokens) == (0, 600)
    [state] = view.states()
    assert state.load.queued_tokens == 600


async def test_requests_in_flight_end_with_their_block(
    directory: Directory, view: ClusterView, make_worker: MakeWorker
) -> None:
    await directory.register(make_worker("p0", Role.PREFILL))
    await view.refresh()
    [state] = view.states()
    with pytest.raises(ZeroDivisionError), view.begin(state, tokens=512):
        raise ZeroDivisionError
    [state] = view.states()
    assert state.load.queued_tokens == 0


async def test_when_stale_for_long_only_own_requests_count(
    own_redis: PrivateRedis, make_worker: MakeWorker
) -> None:
    async with Directory(own_redis.url, lease_seconds=1.0) as directory, ClusterView(directory, 0.02) as view:
        info = await directory.register(make_worker("p0", Role.PREFILL))
        await directory.heartbeat(info, WorkerLoad(queued_tokens=9000, prefill_tokens_per_second=500.0))
        await view.refresh()
        [state] = view.states()
        with view.begin(state, tokens=10):
            os.kill(own_redis.pid, signal.SIGKILL)
            await own_redis.wait()
            await eventually(lambda: view.states()[0].load.queued_tokens == 10)
            assert view.states()[0].load.prefill_tokens_per_second == 500.0


async def test_models_are_grouped(directory: Directory, view: ClusterView, make_worker: MakeWorker) -> None:
    await directory.register(make_worker("p0", Role.PREFILL))
    await directory.register(make_worker("d0"))
    await directory.register(make_worker("e0", model="other"))
    await view.refresh()
    pools = view.models()
    assert {name: [s.info.id for s in pool.states] for name, pool in pools.items()} == {
        "tiny": ["d0", "p0"],
        "other": ["e0"],
    }
    assert pools["tiny"].count(Role.PREFILL) == pools["tiny"].count(Role.DECODE) == 1
    assert view.pool("unknown") is None


async def test_different_fingerprints_are_never_mixed_and_named_once(
    directory: Directory, view: ClusterView, make_worker: MakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    await directory.register(make_worker("p0", Role.PREFILL, fingerprint="aa" * 32))
    await directory.register(make_worker("p1", Role.PREFILL, fingerprint="bb" * 32, block_tokens=32))
    await directory.register(make_worker("d1", fingerprint="bb" * 32, block_tokens=32))
    await view.refresh()
    for _ in range(3):
        pool = view.pool("tiny")
        assert pool is not None
        assert [s.info.id for s in pool.states] == ["d1", "p1"]
    assert caplog.text.count("differ in fingerprint") == 1
    assert "p0: aaaaaaaaaaaa (16 tokens" in caplog.text
    assert "d1, p1: bbbbbbbbbbbb (32 tokens" in caplog.text


async def test_incarnations_are_those_of_one_fingerprint_whatever_their_breakers_say(
    directory: Directory, view: ClusterView, make_worker: MakeWorker
) -> None:
    first, second = [await directory.register(make_worker(name, fingerprint="aa" * 32)) for name in ("d0", "d1")]
    await directory.register(make_worker("d2", fingerprint="bb" * 32))
    await view.refresh()
    gone(view, first)
    assert list(view.incarnations("tiny", "aa" * 32)) == [("d0", first.epoch), ("d1", second.epoch)]
    await directory.unregister(first)
    await view.refresh()
    assert list(view.incarnations("tiny", "aa" * 32)) == [("d1", second.epoch)]
    assert not view.incarnations("other", "aa" * 32)


async def test_the_group_in_use_stays_in_use_while_it_can_decode(
    directory: Directory, view: ClusterView, make_worker: MakeWorker
) -> None:
    first = await directory.register(make_worker("d0", fingerprint="aa" * 32))
    await view.refresh()
    assert view.models()["tiny"].fingerprint == "aa" * 32
    for name in ("d1", "d2"):
        await directory.register(make_worker(name, fingerprint="bb" * 32))
    await view.refresh()
    assert view.models()["tiny"].fingerprint == "aa" * 32
    await directory.unregister(first)
    await view.refresh()
    assert view.models()["tiny"].fingerprint == "bb" * 32


async def test_joining_and_leaving_is_logged(
    directory: Directory, view: ClusterView, make_worker: MakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    info = await directory.register(make_worker("d0"))
    await view.refresh()
    await directory.unregister(info)
    await view.refresh()
    assert "worker d0 joined (decode for tiny" in caplog.text
    assert "worker d0 left" in caplog.text
