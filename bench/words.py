"""Text in place of token ids, for interfaces that take only text: each id becomes one common word.

Most tokenizers hold each of these words, with the space before it, as one token; the true number of tokens is what
the server reports. Invariant: equal ids become equal words, so shared prefixes stay shared.
"""

from __future__ import annotations

from collections.abc import Iterable

# fmt: off
_WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his",
    "they", "at", "be", "this", "have", "from", "or", "one", "had", "by", "but", "not", "what", "all", "were",
    "we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their",
    "if", "will", "up", "other", "about", "out", "many", "then", "them", "these", "so", "some", "her",
    "would", "make", "like", "him", "into", "time", "has", "look", "two", "more", "write", "go", "see",
    "number", "no", "way", "could", "people", "my", "than", "first", "water", "been", "call", "who", "oil",
    "its", "now", "find", "long", "down", "day", "did", "get", "come", "made", "may", "part", "over", "new",
    "sound", "take", "only", "little", "work", "know", "place", "year", "live", "me", "back", "give", "most",
    "very", "after", "thing", "our", "just", "name", "good", "man", "think", "say", "great", "where", "help",
    "through", "much", "before", "line", "right", "too", "mean", "old", "any", "same", "tell", "boy",
    "follow", "came", "want", "show", "also", "around", "form", "three", "small",
)
# fmt: on


def as_text(ids: Iterable[int]) -> str:
    """One word for each id, a space before each."""
    return "".join(f" {_WORDS[token % len(_WORDS)]}" for token in ids)
