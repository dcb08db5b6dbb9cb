"""The directory: which workers live, which blocks each one owns, which transfers are under way.

Redis is the index, the workers are the truth: losing it may cost cache hits, never a request or an answer.
Owns the keys (``ss:worker:{id}``, ``ss:epoch:{id}``, ``ss:blocks:{id}@{epoch}``, ``ss:transfer:{id}`` and the
index ``ss:workers``); knows no scheduler and no policy.
Invariant: what a stale incarnation writes changes nothing.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from splitserve.cluster import WorkerInfo, WorkerLoad, WorkerState
from splitserve.config import TlsFiles
from splitserve.directory_records import (
    TransferRecord,
    TransferState,
    decode_transfer,
    decode_worker,
    encode,
)
from splitserve.redis_client import RedisClient, Script, ScriptCall

logger = logging.getLogger(__name__)

WORKERS = "ss:workers"
CHUNK = 512  # hashes in one script call
EPOCH_LIFE_MS = 24 * 3600 * 1000  # epochs also never fall below the clock, so a forgotten counter is harmless
TRANSFER_LIFE_MS = 60 * 1000


class HeartbeatResult(enum.Enum):
    """What the directory knew of the incarnation that sent a heartbeat."""

    OK = "ok"
    SUPERSEDED = "superseded"  # a newer incarnation of this id exists: stop claiming
    LOST = "lost"  # Redis had forgotten it: announce all blocks again


class Directory:
    """The directory in the Redis at ``url``; times in seconds, ``timeout`` for each call.

    Every method but ``connect`` raises Unavailable when Redis fails or does not answer in time.
    """

    def __init__(
        self, url: str, lease_seconds: float = 5.0, timeout: float = 1.0, tls: TlsFiles | None = None
    ) -> None:
        self.lease_seconds = lease_seconds
        self._lease_ms = max(1, round(lease_seconds * 1000))
        self._redis = RedisClient(url, timeout, tls)
        self._register = Script.named("register")
        self._heartbeat = Script.named("heartbeat")
        self._claim = Script.named("claim")
        self._unregister = Script.named("unregister")
        self._workers = Script.named("workers")
        self._longest_prefix = Script.named("longest_prefix")
        self._transfer = Script.named("transfer")

    @property
    def address(self) -> str:
        """Where Redis is, fit for a log: no password."""
        return self._redis.address

    async def connect(self) -> None:
        """Raises ConfigError with one line, without a password, when Redis can't be reached."""
        await self._redis.connect()

    async def close(self) -> None:
        await self._redis.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def register(self, info: WorkerInfo) -> WorkerInfo:
        """Makes a new incarnation of ``info.id`` the current one and returns it with its epoch.

        The claims of the incarnation before it are dropped. Epochs grow even across a loss of Redis.
        """
        call = ScriptCall(
            self._register,
            keys=[_epoch_key(info.id), _worker_key(info.id), WORKERS],
            args=[info.id, self._lease_ms, EPOCH_LIFE_MS, "ss:blocks:", *encode(info), *encode(WorkerLoad())],
        )
        return replace(info, epoch=int(await self._redis.run(call)))

    async def heartbeat(self, info: WorkerInfo, load: WorkerLoad) -> HeartbeatResult:
        """Renews the lease of this incarnation with all its claims and publishes ``load``."""
        call = ScriptCall(
            self._heartbeat,
            keys=[_epoch_key(info.id), _worker_key(info.id), WORKERS, _blocks_key(info.id, info.epoch)],
            args=[info.id, self._lease_ms, EPOCH_LIFE_MS, info.epoch, *encode(info), *encode(load)],
        )
        reply: bytes = await self._redis.run(call)
        return HeartbeatResult(reply.decode())

    async def apply_block_events(
        self, info: WorkerInfo, filled: Sequence[bytes], evicted: Sequence[bytes]
    ) -> bool:
        """Claims and gives up blocks: net changes, no hash in both lists.

        False: this incarnation is not the current one or its lease has ended; heartbeat to learn which.
        Safe to repeat when it raised.
        """
        calls = [self._claims(info, filled=part) for part in _chunks(filled)]
        calls += [self._claims(info, evicted=part) for part in _chunks(evicted)]
        return all(await self._redis.run_all(calls)) if calls else True

    async def announce(self, info: WorkerInfo, hashes: Sequence[bytes]) -> bool:
        """Replaces all claims of this incarnation by ``hashes``, in one transaction. False as above."""
        calls = [self._claims(info, drop=True)]
        calls += [self._claims(info, filled=part) for part in _chunks(hashes)]
        return all(await self._redis.run_all(calls, atomic=True))

    async def unregister(self, info: WorkerInfo) -> bool:
        """Removes the worker and all its claims at once. False: another incarnation is the current one."""
        keys = [_worker_key(info.id), WORKERS, _blocks_key(info.id, info.epoch)]
        return bool(await self._redis.run(ScriptCall(self._unregister, keys, [info.id, info.epoch])))

    async def workers(self) -> list[WorkerState]:
        """The live workers, ordered by id. An entry that can't be read is logged and left out."""
        states = []
        for lease_left_ms, pairs in await self._redis.run(ScriptCall(self._workers, [WORKERS], ["ss:worker:"])):
            try:
                states.append(decode_worker(pairs, lease_left_ms))
            except ValueError as error:
                logger.warning("a worker in the directory can't be read: %s", error)
        return sorted(states, key=lambda state: state.info.id)

    async def epochs(self, worker_ids: Sequence[str]) -> dict[str, int]:
        """Last epoch of each worker id, live or not; ids that Redis has never heard of are absent."""
        if not worker_ids:
            return {}
        replies = await self._redis.execute("MGET", *map(_epoch_key, worker_ids))
        return {id: int(reply) for id, reply in zip(worker_ids, replies, strict=True) if reply is not None}

    async def longest_prefix(self, hashes: Sequence[bytes], workers: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Number of leading blocks of a prompt that each ``(worker id, epoch)`` owns, in one round trip.

        All hashes are equally long.
        """
        if not hashes or not workers:
            return {id: 0 for id, _ in workers}
        keys = [_blocks_key(id, epoch) for id, epoch in workers]
        # one argument, since packing thousands of them would take longer than the look-up
        args: list[bytes | int] = [len(hashes[0]), b"".join(hashes)]
        reply: bytes = await self._redis.run(ScriptCall(self._longest_prefix, keys, args))
        return {id: int(count) for (id, _), count in zip(workers, reply.split(b","), strict=True)}

    async def set_transfer(
        self,
        transfer_id: bytes,
        source: str | None,
        destination: str | None,
        state: TransferState,
        num_blocks: int | None,
    ) -> None:
        """Notes how far one transfer is; see ``record_transfers``."""
        await self.record_transfers([TransferRecord(transfer_id, state, source, destination, num_blocks)])

    async def record_transfers(self, records: Sequence[TransferRecord]) -> None:
        """Notes how far transfers are, in one round trip. States only advance; None leaves what was there."""
        calls = [
            ScriptCall(
                self._transfer,
                keys=[_transfer_key(record.id)],
                args=[TRANSFER_LIFE_MS, record.state.rank, *encode(record)],
            )
            for record in records
        ]
        if calls:
            await self._redis.run_all(calls)

    async def transfer(self, transfer_id: bytes) -> TransferRecord | None:
        """What is known of a transfer; None when nothing is (any more)."""
        reply = await self._redis.execute("HGETALL", _transfer_key(transfer_id))
        pairs = [part for item in reply.items() for part in item]
        return decode_transfer(transfer_id, pairs) if pairs else None

    def _claims(
        self,
        info: WorkerInfo,
        filled: Sequence[bytes] = (),
        evicted: Sequence[bytes] = (),
        drop: bool = False,
    ) -> ScriptCall:
        return ScriptCall(
            self._claim,
            keys=[_epoch_key(info.id), _worker_key(info.id), _blocks_key(info.id, info.epoch)],
            args=[info.epoch, int(drop), len(filled), *filled, *evicted],
        )


def _chunks(hashes: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (hashes[start : start + CHUNK] for start in range(0, len(hashes), CHUNK))


def _worker_key(worker_id: str) -> str:
    return f"ss:worker:{worker_id}"


def _epoch_key(worker_id: str) -> str:
    return f"ss:epoch:{worker_id}"


def _blocks_key(worker_id: str, epoch: int) -> str:
    return f"ss:blocks:{worker_id}@{epoch}"


def _transfer_key(transfer_id: bytes) -> str:
    return f"ss:transfer:{transfer_id.hex()}"
