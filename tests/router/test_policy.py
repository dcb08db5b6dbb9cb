from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import Demand, Plan, PolicyConfig, plan
from splitserve.cluster import Role, WorkerInfo, WorkerLoad, WorkerState
from splitserve.errors import InvalidRequest, Overloaded, SplitServeError, Unavailable

CONFIG = PolicyConfig()
FAST = WorkerLoad(
    prefill_tokens_per_second=1000.0,
    decode_step_seconds=0.02,
    decode_sequence_seconds=0.001,
    transfer_bytes_per_second=1e9,
)


def worker(id: str, load: WorkerLoad = FAST, **changes: Any) -> WorkerState:
    info = WorkerInfo(
        id=id,
        role=Role.PREFILL if id.startswith("p") else Role.DECODE,
        model="m",
        fingerprint="f",
        grpc_address="",
        block_tokens=16,
        num_blocks=1000,
        max_num_seqs=32,
        max_model_len=8192,
        block_bytes=368_640,
    )
    return WorkerState(replace(info, **changes), load)


def loaded(id: str, **changes: Any) -> WorkerState:
    return worker(id, replace(FAST, **changes))


def choose(
    states: list[WorkerState],
    tokens: int = 1024,
    owned: dict[str, int] | None = None,
    config: PolicyConfig = CONFIG,
    seconds_left: float | None = None,
    **options: Any,
) -> Plan:
    rng = random.Random(0)
    return plan(Demand(tokens, 64, seconds_left), owned or {}, states, config, rng=rng, **options)


def names(chosen: Plan) -> tuple[str | None, str]:
    return chosen.prefill.info.id if chosen.prefill else None, chosen.decode.info.id


# name, states, tokens, blocks owned, (prefill, decode)
CHOICES: list[tuple[str, list[WorkerState], int, dict[str, int], tuple[str | None, str]]] = [
    ("one of each", [worker("p0"), worker("d0")], 1024, {}, ("p0", "d0")),
    (
        "shorter prefill queue",
        [loaded("p0", queued_tokens=2000), worker("p1"), worker("d0")],
        1024,
        {},
        ("p1", "d0"),
    ),
    (
        "faster prefill worker in spite of its queue",
        [loaded("p0", queued_tokens=1000, prefill_tokens_per_second=4000.0), worker("p1"), worker("d0")],
        1024,
        {},
        ("p0", "d0"),
    ),
    ("cached on a prefill worker", [worker("p0"), worker("p1"), worker("d0")], 1024, {"p1": 60}, ("p1", "d0")),
    (
        "cached, and the queue costs less than computing again, for all who come later",
        [worker("p0"), loaded("p1", queued_tokens=4000), worker("d0")],
        1024,
        {"p1": 60},
        ("p1", "d0"),
    ),
    (
        "cached, but behind a long queue",
        [worker("p0"), loaded("p1", queued_tokens=5000), worker("d0")],
        1024,
        {"p1": 60},
        ("p0", "d0"),
    ),
    (
        "shorter steps",
        [worker("p0"), loaded("d0", decode_step_seconds=0.04), worker("d1")],
        1024,
        {},
        ("p0", "d1"),
    ),
    ("fewer waiting", [worker("p0"), loaded("d0", num_waiting=9), worker("d1")], 1024, {}, ("p0", "d1")),
    ("emptier pool", [worker("p0"), loaded("d0", used_blocks=700), worker("d1")], 1024, {}, ("p0", "d1")),
    (
        "a pool with room, though slower",
        [worker("p0"), loaded("d0", used_blocks=990), loaded("d1", decode_step_seconds=0.2)],
        1024,
        {},
        ("p0", "d1"),
    ),
    ("short prompt", [worker("p0"), worker("d0")], 64, {}, (None, "d0")),
    ("just too long for that", [worker("p0"), worker("d0")], 65, {}, ("p0", "d0")),
    (
        "almost all cached on one decode worker",
        [worker("p0"), worker("d0"), worker("d1")],
        1024,
        {"d1": 62},
        (None, "d1"),
    ),
    ("all cached", [worker("p0"), worker("d0")], 1024, {"d0": 64}, (None, "d0")),
    ("no prefill worker", [worker("d0")], 1024, {}, (None, "d0")),
    ("prefill worker draining", [loaded("p0", draining=True), worker("d0")], 1024, {}, (None, "d0")),
    ("decode worker draining", [worker("p0"), loaded("d0", draining=True), worker("d1")], 1024, {}, ("p0", "d1")),
    (
        "too small for the sequence",
        [worker("p0"), worker("d0", num_blocks=60), worker("d1")],
        1024,
        {},
        ("p0", "d1"),
    ),
    ("prefill pool too small", [worker("p0", num_blocks=60), worker("d0")], 1024, {}, (None, "d0")),
    (
        "full prefill queue",
        [loaded("p0", num_waiting=256), loaded("p1", queued_tokens=9000), worker("d0")],
        1024,
        {},
        ("p1", "d0"),
    ),
    ("nothing measured yet", [worker("p0", WorkerLoad()), worker("d0", WorkerLoad())], 1024, {}, ("p0", "d0")),
    (
        "running requests count while steps are not measured",
        [worker("p0"), worker("d0", WorkerLoad(num_running=20)), worker("d1", WorkerLoad())],
        1024,
        {},
        ("p0", "d1"),
    ),
]


@pytest.mark.parametrize(
    ("states", "tokens", "owned", "expected"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES]
)
def test_choice(
    states: list[WorkerState], tokens: int, owned: dict[str, int], expected: tuple[str | None, str]
) -> None:
    assert names(choose(states, tokens, owned)) == expected


def test_workers_that_failed_this_request_are_left_out() -> None:
    states = [worker("p0"), worker("p1"), worker("d0"), worker("d1")]
    assert names(choose(states, excluded={"p0", "d1"})) == ("p1", "d0")
    assert names(choose(states, excluded={"p0", "p1", "d1"})) == (None, "d0")


def test_equal_workers_share() -> None:
    states = [worker(f"p{i}") for i in range(4)] + [worker(f"d{i}") for i in range(4)]
    rng = random.Random(1)
    chosen = [names(plan(Demand(1024, 64), {}, states, CONFIG, rng=rng)) for _ in range(400)]
    for shares in (Counter(c[0] for c in chosen), Counter(c[1] for c in chosen)):
        assert len(shares) == 4
        assert min(shares.values()) > 60


def test_the_plan_says_what_is_left_to_compute_and_how_long_it_takes() -> None:
    chosen = choose([loaded("p0", queued_tokens=1000), worker("d0")], owned={"p0": 32})
    assert (chosen.uncached_prefill, chosen.uncached_decode, chosen.decode_blocks) == (512, 0, 65)
    assert chosen.first_token_seconds == pytest.approx(1.512 + 64 * 368_640 / 1e9)
    alone = choose([worker("d0")], owned={"d0": 32})
    assert (alone.uncached_prefill, alone.uncached_decode) == (0, 512)
    assert alone.first_token_seconds == pytest.approx(0.512)


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    assert choose([worker("d0")], tokens=1024, owned={"d0": 64}).uncached_decode == 1


def test_cached_blocks_on_the_decode_worker_save_their_transfer() -> None:
    states = [worker("p0"), worker("d0"), worker("d1")]
    big = PolicyConfig(tie=0.0)
    assert names(choose(states, owned={"d1": 32}, config=big)) == ("p0", "d1")


def test_no_decode_worker_is_unavailable_with_a_time_to_retry() -> None:
    for states in ([], [worker("p0")], [worker("p0"), loaded("d0", draining=True)]):
        with pytest.raises(Unavailable) as caught:
            choose(states)
        assert caught.value.retry_after > 0


def test_a_sequence_that_fits_nowhere_is_the_clients_error_with_both_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"1088.*960"):
        choose([worker("p0"), worker("d0", num_blocks=60), worker("d1", num_blocks=50)])


def test_full_decode_workers_are_overloaded() -> None:
    with pytest.raises(Overloaded) as caught:
        choose([worker("p0"), loaded("d0", num_waiting=256), loaded("d1", num_waiting=300)])
    assert 1 <= caught.value.retry_after <= 60


def test_full_prefill_workers_are_overloaded_not_bypassed() -> None:
    with pytest.raises(Overloaded):
        choose([loaded("p0", num_waiting=256), worker("d0")])


def test_a_queue_longer_than_the_limit_is_refused_with_the_time_until_it_is_not() -> None:
    with pytest.raises(Overloaded) as caught:
        choose([loaded("p0", queued_tokens=80_000), worker("d0")])
    assert 20 < caught.value.retry_after < 22


def test_a_slow_worker_without_a_queue_is_never_too_slow() -> None:
    assert names(choose([loaded("p0", prefill_tokens_per_second=1.0), worker("d0")])) == ("p0", "d0")


def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    states = [loaded("p0", queued_tokens=5000), worker("d0")]
    with pytest.raises(Overloaded):
        choose(states, seconds_left=3.0)
    assert names(choose(states, seconds_left=30.0)) == ("p0", "d0")


loads = st.builds(
    WorkerLoad,
    num_running=st.integers(0, 50),
    num_waiting=st.integers(0, 300),
    queued_tokens=st.integers(0, 100_000),
    used_blocks=st.integers(0, 1000),
    prefill_tokens_per_second=st.sampled_from([0.0, 100.0, 5000.0]),
    decode_step_seconds=st.sampled_from([0.0, 0.01, 0.5]),
    decode_sequence_seconds=st.sampled_from([0.0, 0.002]),
    transfer_bytes_per_second=st.sampled_from([0.0, 1e8]),
    draining=st.booleans(),
)


@given(
    prefills=st.lists(loads, max_size=4),
    decodes=st.lists(loads, max_size=4),
    tokens=st.integers(1, 20_000),
    cached=st.lists(st.integers(0, 1000), min_size=8, max_size=8),
    excluded=st.sets(st.sampled_from(["p0", "p1", "d0", "d1"])),
    seed=st.integers(0, 9),
)
def test_whatever_the_state_a_plan_is_legal_or_an_error_of_ours(
    prefills: list[WorkerLoad],
    decodes: list[WorkerLoad],
    tokens: int,
    cached: list[int],
    excluded: set[str],
    seed: int,
) -> None:
    states = [worker(f"p{i}", load) for i, load in enumerate(prefills)]
    states += [worker(f"d{i}", load) for i, load in enumerate(decodes)]
    owned = {s.info.id: min(n, tokens // 16) for s, n in zip(states, cached, strict=False)}
    try:
        chosen = plan(Demand(tokens, 64), owned, states, CONFIG, excluded, random.Random(seed))
    except SplitServeError:
        return
    assert chosen.decode.info.role is Role.DECODE
    for state in filter(None, (chosen.prefill, chosen.decode)):
        assert not state.load.draining
        assert state.info.id not in excluded
        assert state.load.num_waiting < CONFIG.max_waiting
    assert tokens + 64 <= 8192
    assert 1 <= chosen.uncached_prefill + chosen.uncached_decode <= tokens
