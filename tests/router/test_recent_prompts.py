from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.recent_prompts import RecentPrompts, either


def test_a_prompt_counts_until_its_time_and_leaves_nothing_behind() -> None:
    recent: RecentPrompts[int] = RecentPrompts()
    recent.add("a", [1, 2, 3], until=10.0)
    assert recent.longest_prefix([1, 2, 9], now=9.0) == {"a": 2}
    assert recent.longest_prefix([1, 2, 3], now=10.0) == {}
    assert len(recent) == 0


def test_a_shared_prefix_stays_as_long_as_any_prompt_with_it() -> None:
    recent: RecentPrompts[int] = RecentPrompts()
    recent.add("a", [1, 2, 3], until=5.0)
    recent.add("a", [1, 2], until=10.0)
    recent.add("b", [1], until=10.0)
    assert recent.longest_prefix([1, 2, 3], now=6.0) == {"a": 2, "b": 1}


def test_no_blocks_are_owned_by_nobody() -> None:
    assert RecentPrompts[int]().longest_prefix([], now=0.0) == {}


def test_the_larger_count_is_taken() -> None:
    assert either({"a": 3, "b": 1}, {"b": 2, "c": 4}) == {"a": 3, "b": 2, "c": 4}


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 5), st.integers(1, 9)), max_size=30
    ),
    st.integers(0, 10),
)
def test_what_is_found_is_what_was_added_and_has_not_ended(
    added: list[tuple[str, int, int, int]], now: int
) -> None:
    recent: RecentPrompts[int] = RecentPrompts()
    chains = [list(range(chain * 10, chain * 10 + 5)) for chain in range(3)]
    for worker, chain, length, until in added:
        recent.add(worker, chains[chain][:length], float(until))
    for chain, blocks in enumerate(chains):
        expected: dict[str, int] = {}
        for worker, of, length, until in added:
            if of == chain and until > now and length:
                expected[worker] = max(length, expected.get(worker, 0))
        assert recent.longest_prefix(blocks, float(now)) == expected
