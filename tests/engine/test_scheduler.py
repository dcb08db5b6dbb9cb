from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.scheduler import Scheduler
from engine.sequence import EngineRequest, Sequence, Status
from splitserve.hashing import PrefixHasher
from splitserve.sampling import SamplingParams

B = 16


def make_scheduler(blocks: int = 64, seqs: int = 8, budget: int = 64) -> Scheduler:
    return Scheduler(BlockPool(blocks), block_tokens=B, max_num_seqs=seqs, max_num_batched_tokens=budget)


def make_sequence(
    name: str, tokens: int, new: int = 4, *, first: int = 0, export: bool = False, loads: bool = False
) -> Sequence:
    ids = list(range(first, first + tokens))
    request = EngineRequest(name, ids, SamplingParams(max_tokens=new), export=export)
    return Sequence.from_request(request, frozenset(), 4096, PrefixHasher(b"root"), loads=loads)


def step(scheduler: Scheduler) -> dict[str, int]:
    """One step as the engine does it, with token 7 for everyone. Rows by sequence."""
    scheduled, loading = scheduler.schedule()
    rows = {item.sequence.id: item.num_tokens for item in scheduled}
    for sequence in loading:
        known = len(sequence.tokens)
        sequence.append(7)
        scheduler.start_loaded(sequence, known)
    for item in scheduled:
        scheduler.start(item)
    for item in scheduled:
        scheduler.settle(item)
        scheduler.advance(item.sequence, item.end)
        if item.samples:
            item.sequence.append(7)
            if item.sequence.export:
                scheduler.hold(item.sequence)
            elif item.sequence.finish_reason:
                scheduler.finish(item.sequence)
    return rows


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(budget=64)
    scheduler.add(make_sequence("a", 150))
    assert [step(scheduler)["a"] for _ in range(4)] == [64, 64, 22, 1]


def test_decodes_go_before_chunks() -> None:
    scheduler = make_scheduler(budget=64)
    scheduler.add(make_sequence("short", 3, 10))
    step(scheduler)
    scheduler.add(make_sequence("long", 100, first=1000))
    assert step(scheduler) == {"short": 1, "long": 63}


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 40, new=1))
    step(scheduler)
    second = make_sequence("b", 40, new=1)
    scheduler.add(second)
    assert step(scheduler) == {"b": 8}
    assert second.num_cached == 32


def test_a_wholly_cached_prompt_still_computes_its_last_block() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 32, new=1))
    step(scheduler)
    scheduler.add(make_sequence("b", 32, new=1))
    assert step(scheduler) == {"b": 16}


def test_a_loading_sequence_reuses_even_the_last_full_block() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 32, new=1))
    step(scheduler)
    loading = make_sequence("b", 32, loads=True)
    scheduler.add(loading)
    step(scheduler)
    assert loading.num_cached == 32
    assert step(scheduler) == {"b": 1}


def test_the_youngest_is_preempted_when_blocks_run_out() -> None:
    scheduler = make_scheduler(blocks=5, budget=64)
    old, young = make_sequence("old", 31, 40), make_sequence("young", 30, 40, first=500)
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert old.status is Status.RUNNING
    assert young.status is Status.WAITING and not young.blocks


def test_a_sequence_that_was_preempted_names_its_blocks_as_a_whole_one_does() -> None:
    scheduler = make_scheduler(blocks=5, budget=64)
    sequences = [make_sequence("old", 31, 40), make_sequence("young", 30, 40, first=500)]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert scheduler.num_preemptions
    for sequence in sequences:
        assert sequence.hash_blocks(B) == PrefixHasher(b"root").next_blocks(sequence.tokens, B)
        assert len(sequence.hashes) == 4


def test_exports_keep_their_blocks_until_they_are_released() -> None:
    scheduler = make_scheduler(blocks=4)
    export = make_sequence("a", 40, export=True)
    scheduler.add(export)
    step(scheduler)
    assert export.status is Status.HELD and scheduler.pool.num_used == 3
    scheduler.finish(export)
    scheduler.check_integrity()


def test_exports_are_never_preempted() -> None:
    scheduler = make_scheduler(blocks=5, budget=16)
    decode, export = make_sequence("d", 15, 60), make_sequence("e", 48, export=True, first=900)
    scheduler.add(decode)
    scheduler.add(export)
    for _ in range(40):
        step(scheduler)
    assert export.status is Status.HELD and len(export.blocks) == 3


def test_waiting_requests_keep_their_order() -> None:
    scheduler = make_scheduler(seqs=1)
    for i in range(3):
        scheduler.add(make_sequence(str(i), 4, 1, first=i * 100))
    assert [list(step(scheduler)) for _ in range(3)] == [["0"], ["1"], ["2"]]


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(
        st.tuples(
            st.integers(1, 90), st.integers(1, 30), st.integers(0, 3), st.sampled_from(["plain", "load", "export"])
        ),
        min_size=1,
        max_size=12,
    ),
    blocks=st.integers(8, 20),
    budget=st.integers(8, 70),
    data=st.data(),
)
def test_everything_that_fits_ends_and_frees_its_blocks(
    work: list[tuple[int, int, int, str]], blocks: int, budget: int, data: st.DataObject
) -> None:
    scheduler = make_scheduler(blocks, seqs=6, budget=budget)
    sequences = []
    for i, (tokens, new, family, kind) in enumerate(work):
        sequence = make_sequence(
            str(i), tokens, new, first=family * 1000, export=kind == "export", loads=kind == "load"
        )
        sequences.append(sequence)
        scheduler.add(sequence)
    for _ in range(3000):
        if all(s.status is Status.FINISHED for s in sequences):
            break
        rows = step(scheduler)
        assert sum(rows.values()) <= budget and len(rows) <= 6
        scheduler.check_integrity()
        for held in list(scheduler.held):
            if data.draw(st.booleans()):
                scheduler.finish(held)
        if not rows and scheduler.held:
            scheduler.finish(next(iter(scheduler.held)))
    assert all(s.status is Status.FINISHED for s in sequences)
    assert scheduler.pool.num_used == 0
