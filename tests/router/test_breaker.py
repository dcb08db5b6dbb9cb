from __future__ import annotations

import pytest

from router.breaker import FAILURES, LONGEST_SECONDS, QUIET_SECONDS, Breakers, Trouble
from splitserve.cluster import Role, WorkerInfo, WorkerLoad, WorkerState
from tests.conftest import MakeWorker

EJECT = 3.0


def members(make: MakeWorker, prefill: int = 2, decode: int = 4) -> dict[str, WorkerInfo]:
    ids = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
    return {id: make(id, Role(id.partition("-")[0]), epoch=1) for id in ids}


def left_out(breakers: Breakers, workers: dict[str, WorkerInfo], now: float) -> set[str]:
    states = [WorkerState(info, WorkerLoad()) for info in workers.values()]
    return workers.keys() - {state.info.id for state in breakers.usable(states, now)}


def fail(breakers: Breakers, worker: WorkerInfo, now: float = 0.0, count: int = FAILURES) -> None:
    for _ in range(count):
        breakers.failed(worker, Trouble.FAILED, now, now)


@pytest.mark.parametrize("trouble", [Trouble.GONE, Trouble.DOWN])
def test_a_worker_in_trouble_is_left_alone_for_a_while(make_worker: MakeWorker, trouble: Trouble) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    breakers.failed(workers["decode-1"], trouble, 10.0, 9.0)
    assert left_out(breakers, workers, 10.0 + EJECT - 0.1) == {"decode-1"}
    assert left_out(breakers, workers, 10.0 + EJECT) == set()


def test_single_failures_eject_nobody(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    for _ in range(10):
        fail(breakers, workers["decode-0"], count=FAILURES - 1)
        breakers.succeeded(workers["decode-0"], EJECT)
    assert left_out(breakers, workers, 0.0) == set()


def test_failures_in_a_row_eject(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    fail(breakers, workers["decode-0"])
    assert left_out(breakers, workers, 1.0) == {"decode-0"}


def test_one_request_tries_a_worker_whose_time_is_over(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    fail(breakers, workers["decode-0"])
    breakers.claim(workers["decode-0"], EJECT)
    assert left_out(breakers, workers, EJECT) == {"decode-0"}
    breakers.succeeded(workers["decode-0"], EJECT)
    assert left_out(breakers, workers, EJECT) == set()


def test_where_nobody_else_is_left_all_may_go_where_one_tries(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker, decode=2)
    breakers.failed(workers["decode-1"], Trouble.GONE, 0.0, 0.0)
    breakers.failed(workers["decode-0"], Trouble.GONE, EJECT, EJECT)
    assert left_out(breakers, workers, EJECT) == {"decode-0"}
    breakers.claim(workers["decode-1"], EJECT)
    assert left_out(breakers, workers, EJECT) == {"decode-0"}
    breakers.failed(workers["decode-1"], Trouble.GONE, EJECT, EJECT)
    assert left_out(breakers, workers, EJECT) == {"decode-0", "decode-1"}


def test_success_of_a_request_sent_before_the_ejection_does_not_end_it(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    breakers.failed(workers["decode-0"], Trouble.GONE, 1.0, 0.5)
    breakers.succeeded(workers["decode-0"], 0.9)
    assert left_out(breakers, workers, 1.1) == {"decode-0"}


def test_a_trial_that_nobody_hears_of_is_followed_by_another(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    fail(breakers, workers["decode-0"])
    breakers.claim(workers["decode-0"], EJECT)
    assert left_out(breakers, workers, 2 * EJECT) == set()


def test_each_trial_that_fails_doubles_the_time(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    fail(breakers, workers["decode-0"])
    now, waits = EJECT, []
    for _ in range(5):
        breakers.claim(workers["decode-0"], now)
        fail(breakers, workers["decode-0"], now, count=1)
        began = now
        while left_out(breakers, workers, now):
            now += 0.5
        waits.append(now - began)
    assert waits == [2 * EJECT, 4 * EJECT, 8 * EJECT, LONGEST_SECONDS, LONGEST_SECONDS]


def test_the_time_of_one_that_is_gone_stays_short(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    for now in (0.0, EJECT, 2 * EJECT):
        breakers.claim(workers["decode-0"], now)
        breakers.failed(workers["decode-0"], Trouble.GONE, now, now)
        assert left_out(breakers, workers, now + EJECT - 0.1) == {"decode-0"}
        assert left_out(breakers, workers, now + EJECT) == set()


def test_failures_of_requests_sent_before_the_ejection_do_not_lengthen_it(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    fail(breakers, workers["decode-0"], count=50)
    assert left_out(breakers, workers, EJECT) == set()


@pytest.mark.parametrize(("decode", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_answers_eject_at_most_half_of_a_role(make_worker: MakeWorker, decode: int, most: int) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker, decode=decode)
    for id, info in workers.items():
        if id.startswith("decode"):
            breakers.failed(info, Trouble.DOWN, 0.0, 0.0)
    assert left_out(breakers, workers, 1.0) == {f"decode-{i}" for i in range(most)}


def test_workers_that_are_gone_are_all_left_alone(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker, prefill=1, decode=2)
    for info in workers.values():
        breakers.failed(info, Trouble.GONE, 0.0, 0.0)
    assert left_out(breakers, workers, 1.0) == workers.keys()


def test_workers_that_are_gone_count_for_the_half(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    for i, trouble in enumerate([Trouble.DOWN, Trouble.DOWN, Trouble.GONE]):
        breakers.failed(workers[f"decode-{i}"], trouble, i / 10, 0.0)
    assert left_out(breakers, workers, 1.0) == {"decode-0", "decode-2"}


def test_what_was_sent_before_the_trouble_moves(make_worker: MakeWorker) -> None:
    breakers, worker = Breakers(EJECT), make_worker(epoch=1)
    assert breakers.failed(worker, Trouble.DOWN, 10.0, 9.0)
    assert breakers.failed(worker, Trouble.DOWN, 10.1, 9.5)
    assert not breakers.failed(worker, Trouble.DOWN, 12.0, 10.5)
    later = 12.0 + QUIET_SECONDS
    assert not breakers.failed(worker, Trouble.DOWN, later, later - 1)
    much_later = later + QUIET_SECONDS + 0.1
    assert breakers.failed(worker, Trouble.DOWN, much_later, much_later - 1)


def test_what_was_on_a_worker_that_is_gone_moves_whenever_it_was_sent(make_worker: MakeWorker) -> None:
    breakers, worker = Breakers(EJECT), make_worker(epoch=1)
    assert breakers.failed(worker, Trouble.GONE, 10.0, 9.0)
    assert breakers.failed(worker, Trouble.GONE, 12.0, 10.5)


def test_what_fails_alone_does_not_move(make_worker: MakeWorker) -> None:
    assert not Breakers(EJECT).failed(make_worker(epoch=1), Trouble.FAILED, 10.0, 9.0)


def test_a_new_incarnation_is_another_worker(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    breakers.failed(workers["decode-0"], Trouble.GONE, 0.0, 0.0)
    workers["decode-0"] = make_worker("decode-0", epoch=2)
    assert left_out(breakers, workers, 0.0) == set()


def test_workers_that_left_are_forgotten(make_worker: MakeWorker) -> None:
    breakers, workers = Breakers(EJECT), members(make_worker)
    breakers.failed(workers["decode-0"], Trouble.GONE, 0.0, 0.0)
    breakers.failed(workers["decode-1"], Trouble.GONE, 0.0, 0.0)
    breakers.keep({("decode-1", 1)}, 0.0)
    assert left_out(breakers, workers, 0.0) == {"decode-1"}
