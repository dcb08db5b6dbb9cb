from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from router.backend import GenerationRequest, ModelSpec
from router.breaker import Incarnation
from router.planner import _HITS, Planner
from router.policy import PolicyConfig
from router.snapshot import ClusterView, ModelPool
from splitserve.cluster import Role, WorkerInfo, WorkerLoad
from splitserve.directory import Directory
from splitserve.errors import InvalidRequest, Overloaded, Unavailable
from splitserve.hashing import BlockHash, PrefixHasher
from splitserve.redis_server import PrivateRedis
from splitserve.sampling import SamplingParams
from tests.router.scripted import MakeWorker

TOKENS = list(range(100))


def request(salt: str = "", **sampling: int) -> GenerationRequest:
    return GenerationRequest("r", "echo", TOKENS, SamplingParams(**{"max_tokens": 8, **sampling}), salt)


async def joined(directory: Directory, make_worker: MakeWorker, spec: ModelSpec) -> list[WorkerInfo]:
    return [
        await directory.register(make_worker(f"{role}-0", role, model=spec.name, fingerprint=spec.fingerprint))
        for role in Role
    ]


@pytest.fixture
async def workers(directory: Directory, make_worker: MakeWorker, spec: ModelSpec) -> list[WorkerInfo]:
    return await joined(directory, make_worker, spec)


@pytest.fixture
async def planner(directory: Directory, workers: list[WorkerInfo]) -> AsyncIterator[Planner]:
    async with ClusterView(directory, refresh_seconds=3600) as view:
        yield Planner(directory, view, PolicyConfig())


async def own(directory: Directory, worker: WorkerInfo, spec: ModelSpec, blocks: int, salt: str = "") -> None:
    hashes = PrefixHasher(bytes.fromhex(spec.fingerprint), salt).next_blocks(TOKENS, spec.block_tokens)
    await directory.apply_block_events(worker, hashes[:blocks], [])


async def test_a_prompt_that_nobody_knows_goes_to_both_pools(planner: Planner, spec: ModelSpec) -> None:
    plan = await planner.plan(request(), spec, TOKENS, ())
    assert plan.prefill is not None and (plan.prefill.info.id, plan.decode.info.id) == ("prefill-0", "decode-0")
    assert plan.uncached_prefill == 100


async def test_blocks_that_a_worker_owns_need_no_computing(
    planner: Planner, spec: ModelSpec, directory: Directory, workers: list[WorkerInfo]
) -> None:
    await own(directory, workers[0], spec, 4)
    assert (await planner.plan(request(), spec, TOKENS, ())).uncached_prefill == 100 - 4 * 16


async def test_a_prompt_that_is_being_computed_counts_as_cached(planner: Planner, spec: ModelSpec) -> None:
    await planner.plan(request(), spec, TOKENS, ())
    plan = await planner.plan(request(), spec, TOKENS, ())
    assert plan.prefill is not None and plan.uncached_prefill == 100 - 6 * 16


async def test_a_prompt_that_was_sent_a_moment_ago_counts_before_the_loop_has_turned(
    own_redis: PrivateRedis, make_worker: MakeWorker, spec: ModelSpec
) -> None:
    async with Directory(own_redis.url, timeout=1.0) as directory:
        await joined(directory, make_worker, spec)
        async with ClusterView(directory, refresh_seconds=3600) as view:
            await own_redis.close()
            await view.refresh()  # a planner that knows that Redis is away waits for nothing
            planner = Planner(directory, view, PolicyConfig())
            uncached = [(await planner.plan(request(), spec, TOKENS, ())).uncached_prefill for _ in range(2)]
    assert uncached == [100, 100 - 6 * 16]


async def test_a_prompt_that_the_decode_worker_knows_skips_the_prefill_worker(
    planner: Planner, spec: ModelSpec, directory: Directory, workers: list[WorkerInfo]
) -> None:
    await own(directory, workers[1], spec, 5)
    plan = await planner.plan(request(), spec, TOKENS, ())
    assert (plan.prefill, plan.uncached_decode) == (None, 20)


@pytest.fixture
def lookups(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks of each look-up."""
    asked: list[int] = []
    ask = directory.longest_prefix

    async def counted(hashes: Sequence[BlockHash], workers: Sequence[tuple[str, int]]) -> dict[str, int]:
        asked.append(len(hashes))
        return await ask(hashes, workers)

    monkeypatch.setattr(directory, "longest_prefix", counted)
    return asked


async def test_under_overload_a_refusal_asks_nobody(planner: Planner, spec: ModelSpec, lookups: list[int]) -> None:
    roomy = planner._config
    planner._config = PolicyConfig(max_waiting=0)
    for _ in range(3):
        with pytest.raises(Overloaded):
            await planner.plan(request(), spec, TOKENS, ())
    assert len(lookups) == 1
    planner._config = roomy
    for _ in range(2):
        await planner.plan(request(), spec, TOKENS, ())
    assert len(lookups) == 3


async def test_while_no_worker_is_ready_one_refusal_in_a_row_asks_anybody(
    planner: Planner, spec: ModelSpec, lookups: list[int]
) -> None:
    changed = replace(spec, fingerprint="11" * 32)
    for _ in range(3):
        with pytest.raises(Unavailable, match="no worker of"):
            await planner.plan(request(), changed, TOKENS, ())
    assert len(lookups) == 1
    await planner.plan(request(), spec, TOKENS, ())
    assert len(lookups) == 2


async def test_the_view_is_read_while_the_directory_is_asked(
    planner: Planner, spec: ModelSpec, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, ask, read = list[str](), directory.longest_prefix, planner._view.pool

    async def asked(hashes: Sequence[BlockHash], workers: Sequence[Incarnation]) -> dict[str, int]:
        events.append("asked")
        owned = await ask(hashes, workers)
        events.append("answered")
        return owned

    def noted(model: str) -> ModelPool | None:
        events.append("read")
        return read(model)

    monkeypatch.setattr(directory, "longest_prefix", asked)
    monkeypatch.setattr(planner._view, "pool", noted)
    await planner.plan(request(), spec, TOKENS, ())
    assert events == ["asked", "read", "answered"]


async def test_a_plan_that_is_cancelled_asks_no_longer(
    planner: Planner, spec: ModelSpec, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, asked = list[str](), asyncio.Event()

    async def silent(hashes: Sequence[BlockHash], workers: Sequence[Incarnation]) -> dict[str, int]:
        asked.set()
        try:
            return await asyncio.Future[dict[str, int]]()
        finally:
            events.append("ended")

    monkeypatch.setattr(directory, "longest_prefix", silent)
    planning = asyncio.create_task(planner.plan(request(), spec, TOKENS, ()))
    await asked.wait()
    planning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await planning
    assert events == ["ended"]


@pytest.mark.parametrize("cached_lately", [False, True])
async def test_under_overload_a_prompt_is_looked_up_if_prompts_as_cached_as_the_last_had_room(
    planner: Planner, spec: ModelSpec, directory: Directory, workers: list[WorkerInfo],
    lookups: list[int], cached_lately: bool,
) -> None:  # fmt: skip
    for i in range(_HITS):
        await planner.plan(request(salt=str(i)), spec, TOKENS, ())
    if cached_lately:
        await own(directory, workers[0], spec, 6, salt="cached")
        await planner.plan(request(salt="cached"), spec, TOKENS, ())
    # 0.2 s of work are queued: with 4 tokens to compute there is room, with 100 there is none
    for worker in workers:
        await directory.heartbeat(worker, WorkerLoad(queued_tokens=200, prefill_tokens_per_second=1000.0))
    await planner._view.refresh()
    planner._config = PolicyConfig(max_first_token_seconds=0.25)
    before = len(lookups)
    for _ in range(3):
        with pytest.raises(Overloaded):
            await planner.plan(request(salt="new"), spec, TOKENS, ())
    assert len(lookups) - before == (3 if cached_lately else 1)


async def test_blocks_of_another_salt_are_not_found(
    planner: Planner, spec: ModelSpec, directory: Directory, workers: list[WorkerInfo]
) -> None:
    await own(directory, workers[0], spec, 6, salt="a")
    assert (await planner.plan(request(salt="b"), spec, TOKENS, ())).uncached_prefill == 100
    assert (await planner.plan(request(salt="a"), spec, TOKENS, ())).uncached_prefill == 4


async def test_prompt_logprobs_are_computed_on_the_decode_worker(
    planner: Planner, spec: ModelSpec, directory: Directory, workers: list[WorkerInfo]
) -> None:
    await own(directory, workers[1], spec, 6)
    plan = await planner.plan(request(prompt_logprobs=1), spec, TOKENS, ())
    assert (plan.prefill, plan.uncached_decode) == (None, 100)


async def test_tokens_given_count_against_what_is_still_to_come(planner: Planner, spec: ModelSpec) -> None:
    wanted = replace(request(), sampling=SamplingParams(max_tokens=8092))  # just fits a context of 8192
    await planner.plan(wanted, spec, TOKENS, ())
    await planner.plan(wanted, spec, [*TOKENS, *range(50)], ())
    with pytest.raises(InvalidRequest):
        await planner.plan(replace(wanted, sampling=SamplingParams(max_tokens=8093)), spec, TOKENS, ())


async def test_excluded_workers_are_not_planned_with(
    planner: Planner, spec: ModelSpec, workers: list[WorkerInfo]
) -> None:
    prefill, decode = ((info.id, info.epoch) for info in workers)
    assert (await planner.plan(request(), spec, TOKENS, {prefill})).prefill is None
    with pytest.raises(Unavailable, match="no decode worker"):
        await planner.plan(request(), spec, TOKENS, {decode})


async def test_a_worker_that_was_restarted_since_it_failed_is_asked_again(
    planner: Planner, spec: ModelSpec, workers: list[WorkerInfo]
) -> None:
    failed = {(info.id, info.epoch - 1) for info in workers}
    assert (await planner.plan(request(), spec, TOKENS, failed)).prefill is not None


async def test_a_model_whose_workers_have_changed_is_not_planned_for(planner: Planner, spec: ModelSpec) -> None:
    for other in (replace(spec, fingerprint="11" * 32), replace(spec, name="nobody")):
        with pytest.raises(Unavailable, match="no worker of"):
            await planner.plan(request(), other, TOKENS, ())


@pytest.mark.parametrize("noticed", [False, True])
async def test_without_the_directory_a_plan_is_still_made(
    own_redis: PrivateRedis, make_worker: MakeWorker, spec: ModelSpec, noticed: bool
) -> None:
    async with Directory(own_redis.url, timeout=1.0) as directory:
        workers = await joined(directory, make_worker, spec)
        await own(directory, workers[0], spec, 4)
        async with ClusterView(directory, refresh_seconds=3600) as view:
            await own_redis.close()
            if noticed:
                await view.refresh()
            async with asyncio.timeout(30):
                plan = await Planner(directory, view, PolicyConfig()).plan(request(), spec, TOKENS, ())
    assert plan.prefill is not None and plan.uncached_prefill == 100
