from __future__ import annotations

import random

from router.retry_budget import RetryBudget


def taken(budget: RetryBudget, now: float, tries: int = 100) -> int:
    return sum(budget.take(now) for _ in range(tries))


def test_a_few_retries_need_no_load() -> None:
    assert taken(RetryBudget(), 0.0) == 3


def test_a_share_of_the_requests_may_be_tried_again() -> None:
    budget = RetryBudget()
    for _ in range(100):
        budget.note_request(0.0)
    assert taken(budget, 0.5) == 20


def test_requests_and_retries_are_forgotten_after_the_window() -> None:
    budget = RetryBudget(window=10)
    for _ in range(100):
        budget.note_request(0.0)
    assert taken(budget, 9.9) == 20
    assert taken(budget, 10.0) == 0, "the requests are forgotten, their retries not yet"
    assert taken(budget, 20.0) == 3


def test_what_moves_without_asking_counts() -> None:
    budget = RetryBudget()
    for _ in range(100):
        budget.note_request(0.0)
    for _ in range(15):
        budget.note_move(0.0)
    assert taken(budget, 0.0) == 5


def test_load_grows_by_no_more_than_the_share_when_everything_fails() -> None:
    draw, budget, requests, retries = random.Random(1), RetryBudget(), 0, 0
    now = 0.0
    while now < 60:
        now += draw.expovariate(50)
        budget.note_request(now)
        requests += 1
        retries += budget.take(now) + budget.take(now)
        assert retries <= max(3, 0.2 * requests) + 1e-9 or now > 10
    assert retries <= 0.21 * requests
