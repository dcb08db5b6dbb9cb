from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import pytest

from router.backend import ModelSpec
from splitserve.cluster import Role
from splitserve.directory import Directory
from splitserve.errors import (
    DeadlineExceeded,
    EngineError,
    Incompatible,
    InvalidRequest,
    Overloaded,
    SplitServeError,
    TransferFailed,
    Unavailable,
)
from splitserve.sampling import FinishReason
from tests.router.scripted import FIRST, PROMPT, Fault, MakeWorker, Script, ScriptedCluster, scripted

Open = Callable[..., AbstractAsyncContextManager[ScriptedCluster]]


@pytest.fixture
def cluster(directory: Directory, make_worker: MakeWorker, spec: ModelSpec) -> Open:
    return lambda script=None, **options: scripted(directory, make_worker, spec, script or Script(), **options)


def whole(max_tokens: int = 6) -> list[tuple[int, int]]:
    return [(i, FIRST + i) for i in range(max_tokens)]


async def answer(cluster: ScriptedCluster, **options: Any) -> list[tuple[int, int]]:
    return [(token.index, token.token) for token in await cluster.tokens(**options)]


def script(prefill: list[Fault | None] | None = None, decode: list[Fault | None] | None = None) -> Script:
    made = Script()
    made.faults[Role.PREFILL].extend(prefill or [])
    made.faults[Role.DECODE].extend(decode or [])
    return made


async def test_an_answer_comes_from_both_pools(cluster: Open) -> None:
    async with cluster() as workers:
        chunks = [chunk async for chunk in workers.generate()]
        [prefill], [decode] = (workers.script.by_role(role) for role in Role)
    assert [(t.index, t.token) for chunk in chunks for t in chunk.tokens] == whole()
    assert [chunk.cached_tokens for chunk in chunks] == [16, None, None, None, None, None]
    assert chunks[0].prefill_worker == prefill.worker == decode.source
    assert {chunk.decode_worker for chunk in chunks[1:]} == {decode.worker}
    assert chunks[-1].tokens[-1].finish_reason is FinishReason.LENGTH


async def test_a_short_prompt_needs_no_prefill_worker(cluster: Open) -> None:
    async with cluster() as workers:
        chunks = [chunk async for chunk in workers.generate(prompt=PROMPT[:10])]
        assert workers.script.by_role(Role.PREFILL) == []
    assert [(t.index, t.token) for chunk in chunks for t in chunk.tokens] == whole()
    assert [chunk.cached_tokens for chunk in chunks] == [32, None, None, None, None, None]


async def test_without_prefill_workers_a_decode_worker_does_it_all(cluster: Open) -> None:
    async with cluster(prefill=0) as workers:
        assert await answer(workers) == whole()


@pytest.mark.parametrize(
    "error", [Unavailable("gone"), Overloaded("full"), Incompatible("other"), EngineError("no")]
)
async def test_a_prefill_that_fails_before_its_handle_goes_on_elsewhere(cluster: Open, error: Exception) -> None:
    async with cluster(script(prefill=[Fault(0, error)])) as workers:
        assert await answer(workers) == whole()
        first, second = workers.script.by_role(Role.PREFILL)
        assert first.worker != second.worker
        assert len(workers.script.by_role(Role.DECODE)) == 1


@pytest.mark.parametrize(
    "fault", [Fault(1, Unavailable("gone"), calls=2), Fault(1, EngineError("no"), calls=2), Fault(1, calls=2)]
)
async def test_a_prefill_that_fails_after_its_handle_goes_on_elsewhere(cluster: Open, fault: Fault) -> None:
    async with cluster(script(prefill=[fault], decode=[Fault(hangs=True)])) as workers:
        assert await answer(workers) == whole()
        first, second = workers.script.by_role(Role.PREFILL)
        assert first.worker != second.worker
        waiting, final = workers.script.by_role(Role.DECODE)
        await waiting.ended.wait()
        assert waiting.cancelled and (waiting.source, final.source) == (first.worker, second.worker)


async def test_a_failed_transfer_goes_on_from_what_was_given(cluster: Open) -> None:
    fault = Fault(0, TransferFailed("no sign of life", "stalled"))
    async with cluster(script(decode=[fault])) as workers:
        assert await answer(workers) == whole()
        first, second = workers.script.by_role(Role.PREFILL)
        assert first.worker != second.worker, "the source of a failed transfer is not asked again"
        assert list(second.sequence.tokens) == [*PROMPT, FIRST] and second.sequence.num_prompt_tokens == len(
            PROMPT
        )
        assert first.worker in workers.usable(), "but others may ask it"


async def test_a_transfer_that_fails_from_the_only_source_is_computed_where_it_was_going(cluster: Open) -> None:
    fault = Fault(0, TransferFailed("no sign of life", "stalled"))
    async with cluster(script(decode=[fault]), prefill=1, decode=1) as workers:
        assert await answer(workers) == whole()
        assert [call.source for call in workers.script.by_role(Role.DECODE)] == ["prefill-0", None]


@pytest.mark.parametrize("fault", [Fault(2, Unavailable("gone")), Fault(2, EngineError("no")), Fault(2)])
async def test_a_decode_that_breaks_in_the_middle_migrates(cluster: Open, fault: Fault) -> None:
    async with cluster(script(decode=[fault])) as workers:
        assert await answer(workers) == whole()
        first, second = workers.script.by_role(Role.DECODE)
        assert first.worker != second.worker
        assert list(second.sequence.tokens) == [*PROMPT, FIRST, FIRST + 1, FIRST + 2]
        assert (
            workers.registry.get_sample_value(
                "splitserve_request_retries_total", {"model_name": "echo", "leg": "decode"}
            )
            == 1
        )


@pytest.mark.parametrize("reason", ["peer_lost", "connect"])
async def test_transfers_lost_with_their_source_need_no_budget(cluster: Open, reason: str) -> None:
    """As many as it held, begun or not: more than the budget would let go on."""
    faults: list[Fault | None] = [Fault(0, TransferFailed("gone", reason), calls=10) for _ in range(5)]
    async with cluster(script(decode=faults), prefill=1) as workers:
        answers = await asyncio.gather(*(answer(workers) for _ in range(5)))
    assert answers == [whole()] * 5


async def test_each_attempt_has_an_id_of_its_own(cluster: Open) -> None:
    """A worker that is asked again may still hold what was left of the attempt before it."""
    faults: list[Fault | None] = [Fault(1, EngineError("a")), Fault(1, EngineError("b"))]
    async with cluster(script(decode=faults), decode=3) as workers:
        assert await answer(workers) == whole()
        ids = [call.sequence.request_id for call in workers.script.by_role(Role.DECODE)]
        assert len(set(ids)) == 3 and all(each.startswith(ids[0]) for each in ids)


async def test_a_decode_worker_that_dies_in_the_middle_is_left_alone(cluster: Open) -> None:
    async with cluster(script(decode=[Fault(2, hangs=True)])) as workers:
        tokens = []
        async with aclosing(workers.generate()) as chunks:
            async for chunk in chunks:
                tokens += [(token.index, token.token) for token in chunk.tokens]
                if len(tokens) == 3:
                    [dying] = workers.script.by_role(Role.DECODE)
                    await workers.servers[dying.worker].stop(0)
        assert tokens == whole()
        assert dying.worker not in workers.usable()


async def test_an_answer_survives_as_many_failures_as_retries(cluster: Open) -> None:
    faults = [Fault(1, EngineError("a")), Fault(1, EngineError("b"))]
    async with cluster(script(decode=list(faults)), decode=3) as workers:
        assert await answer(workers) == whole()
        assert len({call.worker for call in workers.script.by_role(Role.DECODE)}) == 3


@pytest.mark.parametrize("retries", [0, 1, 2])
async def test_when_the_retries_are_used_up_the_last_error_is_raised(cluster: Open, retries: int) -> None:
    faults: list[Fault | None] = [Fault(0, EngineError(f"failure {i}")) for i in range(4)]
    async with cluster(script(decode=faults), decode=4, max_retries=retries) as workers:
        with pytest.raises(EngineError, match=f"failure {retries}"):
            await workers.tokens()
        assert len(workers.script.by_role(Role.DECODE)) == retries + 1


@pytest.mark.parametrize("error", [Overloaded("full", 7.0), EngineError("no"), Unavailable("gone", 3.0)])
async def test_when_no_other_worker_is_left_the_last_error_is_raised(
    cluster: Open, error: SplitServeError
) -> None:
    async with cluster(script(decode=[Fault(0, error)]), decode=1) as workers:
        with pytest.raises(type(error), match=error.message) as raised:
            await workers.tokens()
    assert getattr(raised.value, "retry_after", None) == getattr(error, "retry_after", None)


@pytest.mark.parametrize("role", list(Role))
async def test_a_request_that_can_never_be_served_is_not_tried_again(cluster: Open, role: Role) -> None:
    made = Script()
    made.faults[role].append(Fault(0, InvalidRequest("too long", "prompt")))
    async with cluster(made) as workers:
        with pytest.raises(InvalidRequest, match="too long") as raised:
            await workers.tokens()
        assert len(made.by_role(role)) == 1
        assert len(workers.usable()) == 4, "the workers are not to blame"
    assert raised.value.field == "prompt"


async def test_a_deadline_that_has_passed_asks_no_worker(cluster: Open) -> None:
    async with cluster() as workers:
        with pytest.raises(DeadlineExceeded):
            await workers.tokens(deadline=asyncio.get_running_loop().time() - 1)
        assert workers.script.calls == []


@pytest.mark.parametrize(
    "made",
    [script(prefill=[Fault(0, hangs=True)]), script(decode=[Fault(2, hangs=True)])],
    ids=["prefill", "decode"],
)
async def test_a_deadline_ends_a_leg_that_hangs_and_is_not_retried(cluster: Open, made: Script) -> None:
    async with cluster(made) as workers:
        with pytest.raises(DeadlineExceeded):
            await workers.tokens(deadline=asyncio.get_running_loop().time() + 0.3)
        for call in made.calls:
            await call.ended.wait()
        assert len(made.by_role(Role.PREFILL)) == 1


async def test_leaving_the_answer_cancels_both_calls(cluster: Open) -> None:
    made = script(prefill=[Fault(2, hangs=True)], decode=[Fault(2, hangs=True)])
    async with cluster(made) as workers:
        async with aclosing(workers.generate()) as chunks:
            await anext(chunks)
            await anext(chunks)
        for call in made.calls:
            await call.ended.wait()
        assert len(made.calls) == 2 and all(call.cancelled for call in made.calls)


async def test_leaving_before_the_first_token_cancels_both_calls(cluster: Open) -> None:
    made = script(prefill=[Fault(1, hangs=True)], decode=[Fault(0, hangs=True)])
    async with cluster(made) as workers:
        task = asyncio.ensure_future(anext(workers.generate()))
        while len(made.calls) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait([task])
        for call in made.calls:
            await call.ended.wait()
        assert task.cancelled() and all(call.cancelled for call in made.calls)


async def test_one_token_needs_no_decode_worker(cluster: Open) -> None:
    async with cluster() as workers:
        assert await answer(workers, max_tokens=1) == whole(1)
        assert workers.script.by_role(Role.DECODE) == []


async def test_a_first_token_that_ends_the_answer_is_the_answer(cluster: Open) -> None:
    async with cluster(Script(stop_at=0)) as workers:
        [token] = await workers.tokens()
        assert (token.index, token.finish_reason) == (0, FinishReason.STOP)


async def test_a_failure_before_the_last_token_asks_for_that_one_only(cluster: Open) -> None:
    async with cluster(script(decode=[Fault(4, Unavailable("gone"))])) as workers:
        assert await answer(workers) == whole()
        assert len(workers.script.by_role(Role.DECODE)) == 1, "a prefill gives the one token that lacks"
        assert len(workers.script.by_role(Role.PREFILL)) == 2


async def test_requests_that_fail_are_tried_again_only_while_few_are(cluster: Open) -> None:
    made = Script(always=EngineError("no"))
    async with cluster(made, prefill=0, decode=4) as workers:
        for _ in range(40):
            with pytest.raises((EngineError, Unavailable)):
                await workers.tokens()
    assert 43 <= len(made.calls) <= 48


async def test_a_request_that_may_not_be_tried_again_fails_at_once(cluster: Open) -> None:
    async with cluster(Script(always=EngineError("no")), prefill=0, decode=4) as workers:
        with pytest.raises(EngineError):
            await workers.tokens()
        with pytest.raises(Unavailable, match="too many requests fail") as raised:
            await workers.tokens()
    assert raised.value.retry_after >= 1


async def test_all_answers_of_a_worker_that_dies_go_on_elsewhere(cluster: Open) -> None:
    made = script(decode=[Fault(2, hangs=True)] * 20)
    async with cluster(made, prefill=0, decode=2) as workers:
        asked = [asyncio.ensure_future(answer(workers)) for _ in range(20)]
        while len(made.calls) < 20:
            await asyncio.sleep(0.005)
        await workers.servers["decode-0"].stop(0)
        moved = sum(call.worker == "decode-0" for call in made.calls[:20])
        assert moved > 4, "more than the budget has for so few requests"
        while sum(task.done() for task in asked) < moved:
            await asyncio.sleep(0.005)
        assert all(task.result() == whole() for task in asked if task.done())
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
