from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from engine import AsyncEngine, Engine, EngineConfig, EngineRequest, open_model
from engine.device import CpuDevice
from engine.runner import Runner
from splitserve.errors import DeadlineExceeded, EngineError, InvalidRequest, Overloaded, Unavailable
from splitserve.sampling import SamplingParams

POOL = 40 * 16 * 2 * 2 * 2 * 16 * 4  # bytes: 40 blocks
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
async def engine(tiny: Callable[..., Path]) -> AsyncIterator[AsyncEngine]:
    files = open_model(tiny())
    core = Engine(EngineConfig(str(tiny()), dtype="float32", kv_cache_memory=POOL, threads=1), files)
    served = AsyncEngine(core, max_waiting=4)
    await served.start()
    yield served
    await served.check_integrity()
    await served.close()


def request(name: str, tokens: list[int], params: SamplingParams = GREEDY, **more: bool) -> EngineRequest:
    return EngineRequest(name, tokens, params, **more)


async def answer(engine: AsyncEngine, wanted: EngineRequest) -> list[int]:
    return [t.token async for output in engine.generate(wanted) for t in output.tokens]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_are_answered_together(engine: AsyncEngine) -> None:
    answers = await asyncio.gather(*(answer(engine, request(str(i), [i, 3])) for i in range(4)))
    assert all(len(tokens) == 8 for tokens in answers)


async def test_its_load_tells_what_steps_and_sequences_take(engine: AsyncEngine) -> None:
    lengths = [SamplingParams(temperature=0, max_tokens=12 * i, ignore_eos=True) for i in range(1, 5)]
    await asyncio.gather(*(answer(engine, request(str(p.max_tokens), [1, 2], p)) for p in lengths))
    assert engine.load().decode_step_seconds >= engine.load().decode_sequence_seconds > 0


async def test_leaving_early_frees_the_blocks(engine: AsyncEngine) -> None:
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    async with aclosing(engine.generate(request("a", [1, 2], long))) as outputs:
        await anext(outputs)
    await until(lambda: engine.engine.pool.num_used == 0)


async def test_an_export_gives_one_token_and_keeps_its_blocks(engine: AsyncEngine) -> None:
    outputs = [o async for o in engine.generate(request("a", list(range(40)), export=True))]
    assert outputs[-1].finished and len(outputs[-1].tokens) == 1
    assert outputs[-1].num_computed == 40 and len(outputs[-1].blocks) == 3
    assert engine.engine.pool.num_used == 3
    engine.release("a")
    await until(lambda: engine.engine.pool.num_used == 0)


async def test_a_loaded_request_goes_on_where_the_export_ended(engine: AsyncEngine) -> None:
    prompt = list(range(50, 90))
    whole = await answer(engine, request("whole", prompt))
    async for output in engine.generate(request("export", prompt, export=True)):
        exported = output
    reservation = await engine.reserve(EngineRequest("load", prompt, GREEDY, salt="other"))
    pool = engine.engine.runner.kv
    for source, target in zip(exported.blocks, reservation.blocks, strict=True):
        pool[target] = pool[source]
    loaded = engine.generate_loaded("load", len(prompt), exported.tokens[0].token)
    rest = [t.token async for output in loaded for t in output.tokens]
    engine.release("export")
    assert [exported.tokens[0].token, *rest] == whole


async def test_a_reservation_waits_for_blocks(engine: AsyncEngine) -> None:
    first = await engine.reserve(request("a", [1] * 500, SamplingParams(max_tokens=1)))
    more = request("b", [2] * 500, SamplingParams(max_tokens=1))
    waiting = [asyncio.ensure_future(engine.reserve(more))]
    await asyncio.sleep(0.05)
    engine.abandon(first.request_id, 0)
    reservation = await asyncio.wait_for(waiting[0], 30)
    engine.abandon(reservation.request_id, 0)


async def test_a_reservation_that_is_cancelled_while_it_waits_takes_nothing(engine: AsyncEngine) -> None:
    first = await engine.reserve(request("a", [1] * 500, SamplingParams(max_tokens=1)))
    waiting = asyncio.create_task(engine.reserve(request("b", [2] * 500, SamplingParams(max_tokens=1))))
    await until(lambda: engine.load().num_waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    engine.abandon(first.request_id, 0)
    await until(lambda: engine.engine.pool.num_used == 0 and not engine.engine.has_work)


async def test_what_arrived_of_an_abandoned_reservation_is_cached(engine: AsyncEngine) -> None:
    reservation = await engine.reserve(request("a", list(range(100))))
    engine.abandon(reservation.request_id, 64)
    again = await engine.reserve(request("b", list(range(100))))
    assert again.cached_tokens == 64
    engine.abandon("b", 64)


async def test_too_many_waiting_requests_are_refused(engine: AsyncEngine) -> None:
    blocker = await engine.reserve(request("big", [1] * 500, SamplingParams(max_tokens=1)))
    engine.engine.scheduler.max_num_seqs = 1
    waiting = [asyncio.ensure_future(answer(engine, request(str(i), [i]))) for i in range(4)]
    await until(lambda: len(engine.engine.scheduler.waiting) == 4)
    with pytest.raises(Overloaded):
        await answer(engine, request("more", [1]))
    engine.abandon(blocker.request_id, 0)
    await asyncio.gather(*waiting)


async def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(engine: AsyncEngine) -> None:
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    first = asyncio.ensure_future(answer(engine, request("a", [1], long)))
    await until(lambda: bool(engine.engine.scheduler.running))
    with pytest.raises(InvalidRequest):
        await answer(engine, request("a", [2]))
    assert len(await first) == 60


async def test_a_step_that_fails_ends_its_requests_and_not_the_engine(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.runner, "launch", lambda scheduled, before=None: 1 / 0)
        with pytest.raises(EngineError):
            await answer(engine, request("a", [1, 2]))
    assert len(await answer(engine, request("b", [1, 2]))) == 8


@pytest.mark.parametrize("point", ["launch", "collect"])
async def test_a_request_that_makes_its_step_fail_fails_alone(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    mates = [request(f"mate{i}", [i, 3] * (1 + 20 * i), long) for i in range(3)]
    expected = [await answer(engine, mate) for mate in mates]
    real = getattr(engine.engine.runner, point)

    def explode(step: Any, before: Any = None) -> Any:
        sequences = step.sequences if point == "collect" else [item.sequence for item in step]
        if any(s.id == "poison" and s.num_generated >= 2 for s in sequences):
            raise ZeroDivisionError
        return real(step, before) if point == "launch" else real(step)

    monkeypatch.setattr(engine.engine.runner, point, explode)
    running = [asyncio.ensure_future(answer(engine, mate)) for mate in mates]
    with pytest.raises(EngineError, match="could not compute this request"):
        await answer(engine, request("poison", [9, 9, 9], long))
    assert await asyncio.gather(*running) == expected
    assert engine.engine.pool.num_used == 0


async def test_a_request_whose_deadline_passes_in_the_queue_is_never_begun(engine: AsyncEngine) -> None:
    engine.engine.scheduler.max_num_seqs = 1
    blocker = await engine.reserve(request("blocker", [1] * 20))
    late = EngineRequest("late", [2] * 20, GREEDY, deadline=time.monotonic() + 0.05)
    waiting = asyncio.ensure_future(answer(engine, late))
    await until(lambda: len(engine.engine.scheduler.waiting) == 1)
    await asyncio.sleep(0.06)
    steps, begun = engine.stats.steps, engine.stats.prompt_tokens
    engine.abandon(blocker.request_id, 0)
    with pytest.raises(DeadlineExceeded):
        await waiting
    assert (engine.stats.steps, engine.stats.prompt_tokens) == (steps, begun)


async def test_a_deadline_that_has_not_passed_changes_nothing(engine: AsyncEngine) -> None:
    assert len(await answer(engine, EngineRequest("a", [2], GREEDY, deadline=time.monotonic() + 60))) == 8


async def test_block_events_match_what_is_known(engine: AsyncEngine) -> None:
    await answer(engine, request("a", list(range(64))))
    filled, evicted = engine.take_block_events()
    assert set(filled) == set(engine.known_hashes()) and not evicted


async def test_an_idle_engine_makes_no_steps(engine: AsyncEngine) -> None:
    await answer(engine, request("a", [1]))
    before = engine.stats.steps
    await asyncio.sleep(0.1)
    assert engine.stats.steps == before


async def test_neighbours_are_told_when_it_works_and_when_it_sleeps(tiny: Callable[..., Path]) -> None:
    told: list[bool] = []
    core = Engine(EngineConfig(str(tiny()), dtype="float32", kv_cache_memory=POOL, threads=1), open_model(tiny()))
    engine = AsyncEngine(core, working=told.append)
    await engine.start()
    await until(lambda: told == [False])
    await answer(engine, request("a", [1, 2]))
    await until(lambda: not told[-1])
    assert told.count(True) == 8  # one a step
    await engine.close()
    assert told[-1] is False


async def test_a_failure_of_the_thread_is_told_to_everybody(tiny: Callable[..., Path]) -> None:
    core = Engine(EngineConfig(str(tiny()), dtype="float32", kv_cache_memory=POOL, threads=1), open_model(tiny()))
    broken = AsyncEngine(core)
    await broken.start()
    long = request("a", [1, 2], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    outputs = broken.generate(long)
    await anext(outputs)
    core.scheduler.finish = None  # type: ignore[assignment,method-assign]
    broken.abandon("a", 0)  # which calls it
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable):
            await answer(broken, request("b", [1]))
        with pytest.raises(EngineError):
            while True:
                await asyncio.sleep(0.005)
                broken.load()
        await outputs.aclose()
        with pytest.raises(EngineError, match="has failed"):
            await broken.close()


async def test_a_device_that_fails_for_good_takes_the_engine_with_it(tiny: Callable[..., Path]) -> None:
    class Lost(CpuDevice):
        steps = 3

        def mark(self) -> Callable[[], None]:
            self.steps -= 1
            if self.steps < 0:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().mark()

    files = open_model(tiny())
    config = EngineConfig(str(tiny()), dtype="float32", kv_cache_memory=POOL, threads=1)
    broken = AsyncEngine(Engine(config, files, Runner(config, files, Lost(asynchronous=True))))
    await broken.start()
    async with asyncio.timeout(30):
        for name in "ab":  # the second one comes when the engine has failed
            with pytest.raises(Unavailable, match="the engine has failed"):
                await answer(broken, request(name, [1, 2]))
        with pytest.raises(EngineError):  # so the worker ends
            broken.load()
        with pytest.raises(EngineError):
            await broken.close()
