"""Stop strings are found wherever the pieces are cut, and nothing of them is shown."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from splitserve.text import StopStrings

letters = st.text("ab", max_size=40)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str]) -> str:
    """By ``str.find``: up to the stop that is complete first, of those the one that began first."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.matched is not None:
            return shown, True
    return shown + finder.flush(), False


@given(st.lists(st.text("ab", max_size=6), max_size=12), stop_lists)
@example(["ab", "cd"], ["abcd", "c"])
@example(["aaab"], ["aab", "ab"])
def test_the_outcome_is_that_of_find(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    shown, stopped = run(pieces, stops)
    assert shown == expected(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(letters, stop_lists, st.data())
def test_the_outcome_does_not_depend_on_the_cuts(text: str, stops: list[str], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    assert run([text[:cut], text[cut:]], stops) == run(list(text), stops)


@given(letters, stop_lists)
def test_what_is_shown_is_never_taken_back(text: str, stops: list[str]) -> None:
    finder, shown = StopStrings(stops), ""
    final = expected(text, stops)
    for char in text:
        shown += finder.push(char)
        assert final.startswith(shown)
        if finder.matched is not None:
            break


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    finder = StopStrings(["END"])
    assert finder.push("the EN") == "the "
    assert finder.push("ormous") == "ENormous"


def test_text_that_is_not_checked_is_no_part_of_a_stop() -> None:
    finder = StopStrings(["ab"])
    assert finder.push("xab a", check=False) == "xab a"
    assert finder.push("b") == "b"
    assert finder.matched is None
    assert finder.push("cab") == "c"
    assert finder.matched == "ab"


def test_without_stops_all_text_passes() -> None:
    assert StopStrings([]).push("anything") == "anything"
