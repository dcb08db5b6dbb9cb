"""What is asked: conversations of one or more turns, as token ids.

Owns the making of prompts from lengths and a random generator; knows no server and no time of arrival.
Invariant: two conversations share a prefix only where the data set says so, since ids are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.trace import TraceEntry, block_of

_FIRST_TOKEN = 256  # below are special tokens and single bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation."""

    prompt: Sequence[int]  # ids that it adds to the conversation so far
    output_tokens: int
    think: float = 0.0  # seconds between the answer before and this turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other. ``label`` tells the parts of a mixed load apart."""

    turns: tuple[Turn, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where token ids come from."""

    rng: np.random.Generator
    vocab_size: int

    def draw(self, count: int) -> list[int]:
        """``count`` random ids of plain tokens."""
        ids: list[int] = self.rng.integers(_FIRST_TOKEN, self.vocab_size, count).tolist()
        return ids

    def length(self, mean: int, spread: float) -> int:
        """A length between ``(1 - spread)`` and ``(1 + spread)`` times ``mean``, at least 1."""
        low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
        return max(1, int(self.rng.integers(low, high + 1)))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of prompts and answers, in tokens; ``spread`` as in ``Tokens.length``."""

    input: int
    output: int
    spread: float = 0.0

    def turn(self, tokens: Tokens, prefix: Sequence[int] = (), think: float = 0.0) -> Turn:
        prompt = [*prefix, *tokens.draw(tokens.length(self.input, self.spread))]
        return Turn(prompt, tokens.length(self.output, self.spread), think)


def random_prompts(tokens: Tokens, count: int, lengths: Lengths, prefix: int = 0) -> list[Conversation]:
    """Unrelated prompts, behind ``prefix`` ids that all of them share."""
    shared = tokens.draw(prefix)
    return [Conversation((lengths.turn(tokens, shared),)) for _ in range(count)]


def shared_prefix(tokens: Tokens, count: int, lengths: Lengths, prefix: int, groups: int) -> list[Conversation]:
    """Prompts in ``groups`` of equal size, in random order; those of one begin with the same ``prefix`` ids."""
    prefixes = [tokens.draw(prefix) for _ in range(groups)]
    order = tokens.rng.permutation(np.arange(count) % groups)
    return [Conversation((lengths.turn(tokens, prefixes[group]),), f"group {group}") for group in order]


def multi_turn(
    tokens: Tokens, requests: int, lengths: Lengths, turns: int, system: int, think: float
) -> list[Conversation]:
    """Chats of ``turns`` turns behind one system prompt of ``system`` ids, ``requests`` turns in all.

    ``think``: mean of the exponential pause before each later turn, in seconds.
    """
    shared = tokens.draw(system)
    chats = []
    while requests > 0:
        pauses = tokens.rng.exponential(think, min(turns, requests)) if think else np.zeros(min(turns, requests))
        parts = [lengths.turn(tokens, () if i else shared, float(pause)) for i, pause in enumerate(pauses)]
        chats.append(Conversation(tuple(parts)))
        requests -= len(parts)
    return chats


def mixed(tokens: Tokens, count: int, short: Lengths, long: Lengths, long_share: float) -> list[Conversation]:
    """Short chats into which long prompts fall, ``long_share`` of all at random places."""
    is_long = np.zeros(count, dtype=bool)
    is_long[tokens.rng.permutation(count)[: round(count * long_share)]] = True
    return [
        Conversation(((long if chosen else short).turn(tokens),), "long" if chosen else "short")
        for chosen in is_long
    ]


def from_trace(entries: Sequence[TraceEntry], seed: int, vocab_size: int) -> list[Conversation]:
    """Prompts of the trace's lengths that share what the trace's prompts shared."""
    return [
        Conversation((Turn(_trace_prompt(entry, seed, vocab_size), entry.output_tokens),)) for entry in entries
    ]


def _trace_prompt(entry: TraceEntry, seed: int, vocab_size: int) -> list[int]:
    ids: list[int] = []
    own = abs(hash(entry)) % 2**31
    for index in range(-(-entry.input_tokens // entry.block_tokens)):
        block = block_of(entry.blocks, index)
        key = (seed, 1, block) if block >= 0 else (seed, 2, own, ~block)
        tokens = Tokens(np.random.default_rng(key), vocab_size)
        ids += tokens.draw(min(entry.block_tokens, entry.input_tokens - len(ids)))
    return ids
