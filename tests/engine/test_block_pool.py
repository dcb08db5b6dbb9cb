from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool, OutOfBlocks


def name(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_a_released_block_is_found_again_by_its_hash() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    for i, block in enumerate(blocks):
        pool.name(block, name(i))
    pool.release(blocks)
    assert pool.match([name(0), name(1), name(2)]) == blocks


def test_match_stops_at_the_first_unknown_hash() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.name(block, name(1))
    assert pool.match([name(0), name(1)]) == []


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for i, block in enumerate(blocks):
        pool.name(block, name(i))
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([name(0), name(1), name(2)]) == blocks[:2]


def test_unnamed_blocks_are_reused_before_cached_ones() -> None:
    pool = BlockPool(2)
    named, unnamed = pool.allocate(2)
    pool.name(named, name(0))
    pool.release([named])
    pool.release([unnamed])
    assert pool.allocate(1) == [unnamed]


def test_too_few_blocks_take_nothing() -> None:
    pool = BlockPool(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(3)
    assert pool.num_free == 2


def test_events_tell_the_last_word_on_each_hash() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.name(block, name(0))
    pool.release([block])
    pool.release(pool.allocate(1))
    assert pool.take_events() == {name(0): False}
    assert pool.take_events() == {}


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(1, caching=False)
    (block,) = pool.allocate(1)
    pool.name(block, name(0))
    assert pool.match([name(0)]) == []


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes and go in any order; a model of who holds what says what must be free."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[list[int]] = []
        self.announced: set[bytes] = set()

    @rule(chain=st.lists(st.integers(0, 2), max_size=5), extra=st.integers(0, 3))
    def arrive(self, chain: list[int], extra: int) -> None:
        names = [name(hash(tuple(chain[: i + 1])) & (2**63 - 1)) for i in range(len(chain))]
        cached = self.pool.match(names)
        wanted = len(chain) - len(cached) + extra
        if wanted > self.pool.free_after(cached):
            return
        self.pool.acquire(cached)
        blocks = cached + self.pool.allocate(wanted)
        for block, block_name in zip(blocks, names, strict=False):
            self.pool.name(block, block_name)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def listen(self) -> None:
        for block_name, filled in self.pool.take_events().items():
            (self.announced.add if filled else self.announced.discard)(block_name)
        assert self.announced == set(self.pool.known_hashes())

    @invariant()
    def is_whole(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len({block for blocks in self.held for block in blocks})


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
