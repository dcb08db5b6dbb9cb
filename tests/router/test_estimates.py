from __future__ import annotations

from dataclasses import replace

from router.estimates import estimated
from splitserve.cluster import WorkerLoad, WorkerState
from tests.router.test_policy import worker

KNOWN = WorkerLoad(
    prefill_tokens_per_second=100.0,
    decode_step_seconds=0.002,
    decode_sequence_seconds=0.0002,
    transfer_bytes_per_second=1e8,
)


def test_a_worker_that_has_just_started_is_believed_to_be_like_its_peers() -> None:
    slow = worker("d1", replace(KNOWN, decode_step_seconds=0.004))
    fresh = worker("d2", WorkerLoad(num_running=3))
    *_, estimate = estimated([worker("d0", KNOWN), slow, fresh])
    assert estimate.load == replace(KNOWN, num_running=3, decode_step_seconds=0.003)
    assert estimate.info == fresh.info


def test_what_a_worker_has_measured_stays() -> None:
    states = [worker("d0", KNOWN), worker("d1", replace(KNOWN, decode_step_seconds=0.1))]
    assert estimated(states) == states


def test_peers_are_of_the_same_model_and_role() -> None:
    states: list[WorkerState] = [
        worker("d0", KNOWN),
        worker("p0", WorkerLoad()),
        worker("d1", WorkerLoad(), fingerprint="another"),
    ]
    assert estimated(states) == states


def test_what_nobody_has_measured_stays_unknown() -> None:
    states = [worker("d0", WorkerLoad()), worker("d1", WorkerLoad())]
    assert estimated(states) == states
