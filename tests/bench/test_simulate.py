"""Routing in simulated time: one seed, one result; nothing lost; no rule sees what it should not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sim.cache import Index, PrefixCache
from bench.sim.cluster import SimulatedCluster
from bench.sim.model import BLOCK_TOKENS, Hardware, Limits, Report, Request, requests_of
from bench.sim.rules import RULES, Choice, Rule, View
from bench.simulate import simulate, workers_needed
from bench.trace import TraceEntry, copied, turned

HARDWARE = Hardware(pool_tokens=200 * BLOCK_TOKENS)
LIMITS = Limits(ttft=5.0, tpot=0.05)
MakeRule = Callable[[random.Random], Rule]
every_rule = pytest.mark.parametrize("make", RULES, ids=lambda make: make.name)


def conversations(count: int, turns: int, seed: int = 0) -> list[TraceEntry]:
    """Chats whose prompts grow by whole blocks, each turn with all of those before it."""
    rng = random.Random(seed)
    entries = []
    block = 0
    for chat in range(count):
        blocks: tuple[int, ...] = (0,)
        for turn in range(turns):
            more = rng.randint(1, 6)
            blocks += tuple(range(block + 1, block + 1 + more))
            block += more
            length = len(blocks) * BLOCK_TOKENS
            entries.append(TraceEntry(chat * 0.2 + turn * 8.0, length, rng.randint(1, 60), blocks))
    return sorted(entries, key=lambda entry: entry.time)


class Fixed:
    """Always the same workers."""

    name = "fixed"

    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def choose(self, request: Request, view: View) -> Choice:
        return self._choice


@every_rule
def test_one_seed_gives_one_result(make: MakeRule) -> None:
    first, second = (simulate(conversations(30, 3), 2.0, (3, 2), HARDWARE, make, LIMITS, seed=4) for _ in range(2))
    assert asdict(first) == asdict(second)


@every_rule
def test_every_request_ends_once_and_nothing_is_held(make: MakeRule) -> None:
    cluster = SimulatedCluster(3, 2, HARDWARE, make(random.Random(1)))
    requests = requests_of(conversations(40, 3), 5.0)
    outcomes = cluster.run(requests)
    assert {id(outcome.request) for outcome in outcomes} == {id(request) for request in requests}
    assert all(worker.used_blocks == 0 and worker.running == 0 for worker in cluster.decodes)
    assert all(len(worker.cache) <= HARDWARE.pool_blocks for worker in [*cluster.prefills, *cluster.decodes])


@every_rule
def test_times_are_possible(make: MakeRule) -> None:
    cluster = SimulatedCluster(3, 2, HARDWARE, make(random.Random(1)))
    for outcome in cluster.run(requests_of(conversations(40, 3), 5.0)):
        request = outcome.request
        if not outcome.refused:
            fresh = request.input_tokens - outcome.cached_tokens
            assert outcome.ttft >= fresh / HARDWARE.prefill_tokens_per_second
            assert request.output_tokens == 1 or outcome.tpot >= HARDWARE.decode_step_seconds


def test_an_idle_cluster_takes_the_given_times() -> None:
    request = Request(1.0, 4 * BLOCK_TOKENS, 11, (1, 2, 3, 4))
    (outcome,) = SimulatedCluster(1, 1, HARDWARE, Fixed(Choice(0, 0))).run([request])
    step = HARDWARE.step_seconds(1, request.input_tokens + 5)
    block = BLOCK_TOKENS * HARDWARE.kv_bytes_per_token / HARDWARE.link_bytes_per_second
    assert outcome.ttft == pytest.approx(HARDWARE.prefill_seconds(0, request.input_tokens))
    assert outcome.tpot == pytest.approx(step + block / 10)


def test_a_prompt_that_is_cached_is_not_computed_again() -> None:
    blocks = (1, 2, 3)
    requests = [Request(time, 3 * BLOCK_TOKENS + 10, 2, blocks) for time in (0.0, 10.0)]
    first, second = SimulatedCluster(1, 1, HARDWARE, Fixed(Choice(0, 0))).run(requests)
    assert (first.cached_tokens, second.cached_tokens) == (0, 3 * BLOCK_TOKENS)
    assert second.ttft < first.ttft / 5


def test_a_prompt_computed_on_the_decode_worker_stalls_the_others() -> None:
    long = Request(0.05, 20 * BLOCK_TOKENS, 2, ())
    slow, fast = (
        SimulatedCluster(1, 1, HARDWARE, Fixed(Choice(None, 0))).run([Request(0.0, 600, 50, ()), *more])
        for more in ([long], [])
    )
    stalled = next(outcome for outcome in slow if outcome.request.output_tokens == 50)
    assert stalled.tpot > fast[0].tpot + HARDWARE.prefill_seconds(0, long.input_tokens) / 60


def test_a_full_pool_makes_requests_wait_but_loses_none() -> None:
    hardware = replace(HARDWARE, pool_tokens=4 * BLOCK_TOKENS)
    requests = [Request(0.0, 2 * BLOCK_TOKENS, 100, ()) for _ in range(6)]
    outcomes = SimulatedCluster(1, 1, hardware, Fixed(Choice(0, 0))).run(requests)
    ends = sorted(outcome.ended for outcome in outcomes)
    assert all(after - before > 50 * hardware.decode_step_seconds for before, after in pairwise(ends))


def test_a_request_that_no_worker_can_hold_is_refused_by_the_policy() -> None:
    hardware = replace(HARDWARE, pool_tokens=4 * BLOCK_TOKENS)
    entries = [TraceEntry(0.0, 9 * BLOCK_TOKENS, 5, ()), TraceEntry(0.0, BLOCK_TOKENS, 5, ())]
    report = simulate(entries, 1.0, (1, 1), hardware, RULES[0], LIMITS, seed=0)
    assert (report.requests, report.refused) == (2, 1)


def test_the_policy_finds_more_in_caches_than_round_robin() -> None:
    entries = conversations(60, 4)
    ours, robin = (simulate(entries, 1.0, (8, 4), HARDWARE, make, LIMITS, seed=0) for make in RULES[:2])
    assert ours.hit_rate > 1.5 * robin.hit_rate


def test_workers_needed_suffice_and_are_few() -> None:
    entries = conversations(60, 3)

    def report(pools: tuple[int, int]) -> Report:
        return simulate(entries, 4.0, pools, HARDWARE, RULES[0], LIMITS, seed=0)

    needed = workers_needed(report, 0.9, most=32)
    assert needed is not None
    assert report(needed).attainment >= 0.9
    assert sum(needed) < 32


def test_a_load_for_which_no_pool_is_large_enough_has_no_answer() -> None:
    impossible = Limits(ttft=1e-6, tpot=1e-6)

    def report(pools: tuple[int, int]) -> Report:
        return simulate(conversations(5, 2), 1.0, pools, HARDWARE, RULES[0], impossible, seed=0)

    assert workers_needed(report, 0.9, most=4) is None


def test_copies_share_nothing_and_keep_the_span() -> None:
    entries = conversations(5, 2)
    twice = copied(entries, 2, seed=1)
    assert len(twice) == 2 * len(entries)
    assert max(entry.time for entry in twice) <= max(entry.time for entry in entries)
    own = {block for entry in entries for block in entry.blocks}
    foreign = [entry for entry in twice if not own & set(entry.blocks)]
    assert len(foreign) == len(entries)


def test_a_turned_trace_has_the_same_requests_in_order_of_time() -> None:
    entries = conversations(5, 2)
    assert turned(entries, 0) == entries
    other = turned(entries, 1)
    assert other != entries
    assert sorted(e.blocks for e in other) == sorted(e.blocks for e in entries)
    assert [e.time for e in other] == sorted(e.time for e in other)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 6)), max_size=60), st.integers(1, 12)
)
def test_the_index_names_what_the_caches_hold(stores: list[tuple[int, int, int]], capacity: int) -> None:
    index = Index()
    caches = [PrefixCache(worker, capacity, index) for worker in range(3)]
    chains = [tuple(range(chain * 10, chain * 10 + 6)) for chain in range(4)]
    for worker, chain, length in stores:
        caches[worker].store(chains[chain][:length])
        assert len(caches[worker]) <= capacity
    for chain in chains:
        found = index.longest_prefix(chain)
        assert {worker: cache.match(chain) for worker, cache in enumerate(caches) if cache.match(chain)} == found
