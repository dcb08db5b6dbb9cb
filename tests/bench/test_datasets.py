"""Prompts and what they share."""

from __future__ import annotations

import numpy as np
import pytest

from bench.datasets import Lengths, Tokens, mixed, multi_turn, random_prompts, shared_prefix


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(np.random.default_rng(5), 30_000)


def test_random_prompts_have_exact_lengths_and_plain_ids(tokens: Tokens) -> None:
    chats = random_prompts(tokens, 20, Lengths(33, 7))
    turns = [turn for chat in chats for turn in chat.turns]
    assert {(len(turn.prompt), turn.output_tokens) for turn in turns} == {(33, 7)}
    assert all(256 <= token < 30_000 for turn in turns for token in turn.prompt)
    assert len({tuple(turn.prompt[:8]) for turn in turns}) == 20


def test_lengths_spread_around_their_mean(tokens: Tokens) -> None:
    lengths = [len(chat.turns[0].prompt) for chat in random_prompts(tokens, 300, Lengths(100, 10, 0.5))]
    assert (min(lengths), max(lengths)) == pytest.approx((50, 150), abs=3)


def test_prompts_of_a_group_share_their_prefix(tokens: Tokens) -> None:
    chats = shared_prefix(tokens, 30, Lengths(10, 1), prefix=16, groups=3)
    prefixes = {
        chat.label: {tuple(c.turns[0].prompt[:16]) for c in chats if c.label == chat.label} for chat in chats
    }
    assert len(prefixes) == 3
    assert all(len(found) == 1 for found in prefixes.values())
    assert [sum(chat.label == label for chat in chats) for label in prefixes] == [10, 10, 10]


def test_turns_add_up_to_the_requests_asked_for(tokens: Tokens) -> None:
    chats = multi_turn(tokens, 10, Lengths(8, 2), turns=4, system=5, think=1.0)
    assert [len(chat.turns) for chat in chats] == [4, 4, 2]
    assert len({tuple(chat.turns[0].prompt[:5]) for chat in chats}) == 1
    assert [len(turn.prompt) for turn in chats[0].turns] == [13, 8, 8, 8]


def test_a_mix_has_its_share_of_long_prompts(tokens: Tokens) -> None:
    chats = mixed(tokens, 50, Lengths(10, 9), Lengths(400, 3), long_share=0.2)
    sizes = [(chat.label, len(chat.turns[0].prompt)) for chat in chats]
    assert sizes.count(("long", 400)) == 10
    assert sizes.count(("short", 10)) == 40
