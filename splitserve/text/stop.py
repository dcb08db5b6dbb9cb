"""Stop strings in a text that arrives in pieces.

Owns the text that is held back because it may be the beginning of a stop string; knows no tokens.
Invariant: the outcome does not depend on how the text was cut into pieces. The stop string that is complete
first wins; if several end at the same character, the longest. Knuth, Morris and Pratt's automaton keeps the
work per character constant.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed it the text; what it gives back may be shown.

    Args:
        stops: strings that end the text and are not part of it; none may be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        # longest first: of those that end at the same character the first in the list is taken
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text now ends with
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str, check: bool = True) -> str:
        """Takes the next piece and returns what became certain.

        With ``check=False`` the piece, and what was held back, can no longer be part of a stop string.
        """
        assert self.matched is None, "the text has already ended"
        if not self._stops:
            return text
        if not check:
            self._matched = [0] * len(self._stops)
            return self._release(self._held + text, 0)
        text = self._held + text
        for position in range(len(self._held), len(text)):
            for which, stop in enumerate(self._stops):
                if self._advance(which, text[position]) == len(stop):
                    self.matched = stop
                    self._held = ""
                    return text[: position + 1 - len(stop)]
        return self._release(text, max(self._matched))

    def flush(self) -> str:
        """The text has ended by itself: what was held back is a part of it."""
        return self._release(self._held, 0)

    def _release(self, text: str, keep: int) -> str:
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def _advance(self, which: int, char: str) -> int:
        stop, borders, length = self._stops[which], self._borders[which], self._matched[which]
        while length and stop[length] != char:
            length = borders[length - 1]
        if stop[length] == char:
            length += 1
        self._matched[which] = length
        return length


def _borders(text: str) -> list[int]:
    """For each prefix the length of the longest proper prefix of it that is also its end."""
    borders, length = [0] * len(text), 0
    for position in range(1, len(text)):
        while length and text[position] != text[length]:
            length = borders[length - 1]
        if text[position] == text[length]:
            length += 1
        borders[position] = length
    return borders
