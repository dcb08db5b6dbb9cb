from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.cluster import Role, WorkerInfo, WorkerLoad
from splitserve.directory import CHUNK, Directory, HeartbeatResult
from splitserve.directory_records import TransferRecord, TransferState
from splitserve.errors import ConfigError, Unavailable
from splitserve.redis_client import RedisClient
from splitserve.redis_server import PrivateRedis

MakeWorker = Callable[..., WorkerInfo]


def hashes(count: int, seed: int = 0) -> list[bytes]:
    return [random.Random(seed * 100_000 + i).randbytes(32) for i in range(count)]


async def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Awaits until the coroutine function ``condition`` gives something true."""
    async with asyncio.timeout(seconds):
        while not await condition():  # type: ignore[misc]
            await asyncio.sleep(0.02)


async def keys(url: str, pattern: str = "*") -> list[bytes]:
    client = RedisClient(url, 5.0)
    found = await client.execute("KEYS", pattern)
    await client.close()
    return sorted(found)


async def test_a_registered_worker_is_listed_as_it_described_itself(
    directory: Directory, make_worker: MakeWorker
) -> None:
    info = make_worker("prefill-0", Role.PREFILL, pid=7, version="0.1", block_bytes=368_640)
    registered = await directory.register(info)
    [state] = await directory.workers()
    assert state.info == registered
    assert state.load == WorkerLoad()
    assert 0 <= state.age_seconds < 5


async def test_epochs_grow_with_each_registration(directory: Directory, worker: WorkerInfo) -> None:
    epochs = [(await directory.register(worker)).epoch for _ in range(5)]
    assert epochs == sorted(set(epochs))
    assert await directory.epochs([worker.id, "nobody"]) == {worker.id: epochs[-1]}


async def test_epochs_grow_even_when_redis_forgot_the_counter(
    redis_url: str, directory: Directory, worker: WorkerInfo
) -> None:
    before = await directory.register(worker)
    client = RedisClient(redis_url, 5.0)
    await client.execute("FLUSHALL")
    await client.close()
    await asyncio.sleep(0.002)
    assert (await directory.register(worker)).epoch > before.epoch


async def test_a_heartbeat_publishes_the_load(directory: Directory, worker: WorkerInfo) -> None:
    info = await directory.register(worker)
    load = WorkerLoad(num_running=3, queued_tokens=512, prefill_tokens_per_second=640.5, draining=True)
    assert await directory.heartbeat(info, load) is HeartbeatResult.OK
    [state] = await directory.workers()
    assert state.load == load


async def test_age_is_the_time_since_the_last_heartbeat(directory: Directory, worker: WorkerInfo) -> None:
    await directory.register(worker)
    await asyncio.sleep(0.15)
    [state] = await directory.workers()
    assert 0.14 <= state.age_seconds < 5


async def test_the_lease_end_removes_the_worker_with_all_its_claims(redis_url: str, worker: WorkerInfo) -> None:
    async with Directory(redis_url, lease_seconds=1.0) as directory:
        info = await directory.register(worker)
        chain = hashes(5)
        await directory.apply_block_events(info, chain, [])
        assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: 5}
        await asyncio.sleep(1.05)
        assert await directory.workers() == []
        assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: 0}
        assert await keys(redis_url) == [b"ss:epoch:decode-0"]


async def test_a_heartbeat_keeps_the_claims_alive(redis_url: str, worker: WorkerInfo) -> None:
    async with Directory(redis_url, lease_seconds=1.5) as directory:
        info = await directory.register(worker)
        chain = hashes(3)
        await directory.apply_block_events(info, chain, [])
        for _ in range(4):
            await asyncio.sleep(0.4)
            assert await directory.heartbeat(info, WorkerLoad()) is HeartbeatResult.OK
        assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: 3}


async def test_a_stale_incarnation_can_write_nothing(directory: Directory, worker: WorkerInfo) -> None:
    old = await directory.register(worker)
    new = await directory.register(worker)
    chain = hashes(4)
    await directory.apply_block_events(new, chain[:2], [])
    assert await directory.heartbeat(old, WorkerLoad(num_running=99)) is HeartbeatResult.SUPERSEDED
    assert not await directory.apply_block_events(old, chain, [])
    assert not await directory.announce(old, chain)
    assert not await directory.unregister(old)
    [state] = await directory.workers()
    assert state.info.epoch == new.epoch
    assert state.load.num_running == 0
    assert await directory.longest_prefix(chain, [(old.id, old.epoch)]) == {old.id: 0}
    assert await directory.longest_prefix(chain, [(new.id, new.epoch)]) == {new.id: 2}


async def test_registering_drops_the_claims_of_the_incarnation_before(
    redis_url: str, directory: Directory, worker: WorkerInfo
) -> None:
    old = await directory.register(worker)
    await directory.apply_block_events(old, hashes(3), [])
    await directory.register(worker)
    assert await keys(redis_url, "ss:blocks:*") == []


async def test_a_worker_that_redis_forgot_is_told_and_written_again(
    redis_url: str, directory: Directory, worker: WorkerInfo
) -> None:
    info = await directory.register(worker)
    chain = hashes(3)
    await directory.announce(info, chain)
    client = RedisClient(redis_url, 5.0)
    await client.execute("FLUSHALL")
    await client.close()
    assert not await directory.apply_block_events(info, chain, [])
    assert await directory.heartbeat(info, WorkerLoad()) is HeartbeatResult.LOST
    assert await directory.epochs([info.id]) == {info.id: info.epoch}
    assert await directory.heartbeat(info, WorkerLoad()) is HeartbeatResult.OK
    assert await directory.announce(info, chain)
    assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: 3}


async def test_after_a_loss_the_newest_incarnation_wins_whoever_is_first(
    redis_url: str, directory: Directory, worker: WorkerInfo
) -> None:
    old = await directory.register(worker)
    new = await directory.register(worker)
    client = RedisClient(redis_url, 5.0)
    await client.execute("FLUSHALL")
    await client.close()
    assert await directory.heartbeat(old, WorkerLoad()) is HeartbeatResult.LOST
    assert await directory.heartbeat(new, WorkerLoad()) is HeartbeatResult.LOST
    assert await directory.heartbeat(old, WorkerLoad()) is HeartbeatResult.SUPERSEDED


async def test_unregistering_removes_worker_and_claims_at_once(
    redis_url: str, directory: Directory, worker: WorkerInfo
) -> None:
    info = await directory.register(worker)
    await directory.apply_block_events(info, hashes(3), [])
    assert await directory.unregister(info)
    assert await directory.workers() == []
    assert await keys(redis_url) == [b"ss:epoch:decode-0"]


async def test_block_events_larger_than_a_chunk_arrive_whole(directory: Directory, worker: WorkerInfo) -> None:
    info = await directory.register(worker)
    chain = hashes(3 * CHUNK + 7)
    assert await directory.apply_block_events(info, chain, [])
    assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: len(chain)}
    assert await directory.apply_block_events(info, [], chain[CHUNK:])
    assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: CHUNK}


async def test_announcing_replaces_all_claims(directory: Directory, worker: WorkerInfo) -> None:
    info = await directory.register(worker)
    before, after = hashes(CHUNK + 1, seed=1), hashes(2 * CHUNK + 1, seed=2)
    await directory.announce(info, before)
    await directory.announce(info, after)
    assert await directory.longest_prefix(before, [(info.id, info.epoch)]) == {info.id: 0}
    assert await directory.longest_prefix(after, [(info.id, info.epoch)]) == {info.id: len(after)}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(owned=st.lists(st.integers(0, 40), min_size=1, max_size=6), length=st.integers(0, 40))
async def test_longest_prefix_equals_counting(
    directory: Directory, make_worker: MakeWorker, owned: list[int], length: int
) -> None:
    chain = hashes(40, seed=3)
    workers = []
    for i, count in enumerate(owned):
        info = await directory.register(make_worker(f"w{i}"))
        await directory.announce(info, chain[:count])
        workers.append((info.id, info.epoch))
    expected = {f"w{i}": min(count, length) for i, count in enumerate(owned)}
    assert await directory.longest_prefix(chain[:length], workers) == expected


async def test_longest_prefix_of_nobody_is_empty(directory: Directory) -> None:
    assert await directory.longest_prefix(hashes(3), []) == {}


async def test_a_transfer_only_advances(directory: Directory) -> None:
    id = bytes(range(16))
    assert await directory.transfer(id) is None
    await directory.set_transfer(id, "p0", None, TransferState.COMPUTING, 64)
    await directory.record_transfers([TransferRecord(id, TransferState.PULLED, destination="d0")])
    await directory.set_transfer(id, None, None, TransferState.READY, None)
    assert await directory.transfer(id) == TransferRecord(id, TransferState.PULLED, "p0", "d0", 64)


async def test_an_entry_that_cannot_be_read_is_left_out(
    redis_url: str, directory: Directory, worker: WorkerInfo, caplog: pytest.LogCaptureFixture
) -> None:
    info = await directory.register(worker)
    client = RedisClient(redis_url, 5.0)
    await client.execute("SADD", "ss:workers", "odd")
    await client.execute("HSET", "ss:worker:odd", "role", '"juggler"', "lease_ms", "5000")
    await client.close()
    assert [state.info for state in await directory.workers()] == [info]
    assert "can't be read" in caplog.text


async def test_connecting_to_nothing_is_one_line_without_the_password() -> None:
    directory = Directory("redis://me:hunter2@127.0.0.1:1/0?password=hunter3")
    with pytest.raises(ConfigError) as caught:
        await directory.connect()
    await directory.close()
    assert "redis://127.0.0.1:1/0" in caught.value.message
    assert "hunter" not in caught.value.message
    assert "\n" not in caught.value.message


def test_an_address_that_is_no_redis_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a Redis URL"):
        Directory("http://127.0.0.1:1")


async def test_a_redis_that_ends_is_unavailable_and_comes_back(
    own_redis: PrivateRedis, worker: WorkerInfo
) -> None:
    async with Directory(own_redis.url) as directory:
        info = await directory.register(worker)
        os.kill(own_redis.pid, signal.SIGKILL)
        await own_redis.wait()
        with pytest.raises(Unavailable):
            await directory.workers()
        await own_redis.restart()
        assert await directory.workers() == []
        assert await directory.heartbeat(info, WorkerLoad()) is HeartbeatResult.LOST


async def test_a_redis_that_is_silent_is_unavailable_within_the_deadline(
    own_redis: PrivateRedis, worker: WorkerInfo
) -> None:
    async with Directory(own_redis.url, timeout=1.0) as directory:
        await directory.register(worker)
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            with pytest.raises(Unavailable, match="no answer within"):
                await directory.workers()
            assert time.monotonic() - start < 15
            with pytest.raises(Unavailable, match="does not answer"):
                await directory.longest_prefix(hashes(1), [(worker.id, 1)])
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)

        async def back() -> bool:
            try:
                return len(await directory.workers()) == 1
            except Unavailable:
                return False

        await eventually(back)


async def test_a_cancelled_call_leaves_no_answer_behind_for_the_next(
    directory: Directory, worker: WorkerInfo
) -> None:
    info = await directory.register(worker)
    chain = hashes(20)
    await directory.announce(info, chain)
    for i in range(50):
        call = asyncio.create_task(directory.workers())
        for _ in range(i % 7):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert await directory.longest_prefix(chain, [(info.id, info.epoch)]) == {info.id: 20}
