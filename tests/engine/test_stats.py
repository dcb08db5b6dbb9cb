from __future__ import annotations

import random

import pytest

from engine.stats import EngineStats


def test_prefill_speed_comes_from_steps_with_many_rows() -> None:
    stats = EngineStats()
    stats.record_step(prefill_rows=31, decode_rows=0, seconds=1.0)
    assert stats.prefill_tokens_per_second == 0.0
    stats.record_step(prefill_rows=512, decode_rows=4, seconds=0.5)
    assert stats.prefill_tokens_per_second == 1024.0


def test_a_decode_step_is_one_without_prefill() -> None:
    stats = EngineStats()
    stats.record_step(prefill_rows=8, decode_rows=4, seconds=0.5)
    assert stats.decode_step_seconds == 0.0
    stats.record_step(prefill_rows=0, decode_rows=4, seconds=0.02)
    stats.record_step(prefill_rows=0, decode_rows=4, seconds=0.03)
    assert stats.decode_step_seconds == pytest.approx(0.022)


def test_what_one_more_sequence_adds_is_the_slope_of_recent_steps() -> None:
    draw, stats = random.Random(1), EngineStats()
    for _ in range(500):
        rows = draw.randrange(1, 33)
        stats.record_step(0, rows, 0.010 + 0.0004 * rows + draw.uniform(-1e-3, 1e-3))
    assert stats.decode_sequence_seconds == pytest.approx(0.0004, rel=0.2)
    for _ in range(500):
        rows = draw.randrange(1, 33)
        stats.record_step(0, rows, 0.010 + 0.0001 * rows)
    assert stats.decode_sequence_seconds == pytest.approx(0.0001, rel=0.1), "forgets the older ones"


def test_batches_of_one_size_say_nothing_of_one_more_sequence() -> None:
    stats = EngineStats()
    for seconds in (0.01, 0.02, 0.03) * 50:
        stats.record_step(0, 8, seconds)
    assert stats.decode_sequence_seconds == 0.0


def test_what_was_learnt_stays_while_batches_keep_their_size() -> None:
    stats = EngineStats()
    for rows in (2, 10) * 50:
        stats.record_step(0, rows, 0.01 + 0.001 * rows)
    learnt = stats.decode_sequence_seconds
    for _ in range(2000):
        stats.record_step(0, 6, 0.016)
    assert learnt == pytest.approx(0.001, rel=0.01)
    assert stats.decode_sequence_seconds == pytest.approx(learnt, rel=0.01)


def test_a_sequence_that_seems_to_cost_less_than_nothing_costs_hardly_anything() -> None:
    stats = EngineStats()
    for rows in (2, 10) * 50:
        stats.record_step(0, rows, 0.02 - 0.001 * rows)
    assert 0 < stats.decode_sequence_seconds < 1e-5
