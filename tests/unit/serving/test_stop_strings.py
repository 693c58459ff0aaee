from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath_ray.serving.stop_strings import StopStrings


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    filter = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += filter.push(piece)
        if filter.found:
            return out, True
    return out + filter.finish(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["hello"], ("hello", False)),
        (["STOP"], ["a S", "T", "OP b"], ("a ", True)),
        (["STOP"], ["a S", "T", "O"], ("a STO", False)),
        (["\n\n"], ["x\n", "y\n", "\nz"], ("x\ny", True)),
        (["abcd", "c"], ["abcd"], ("ab", True)),
        (["abc", "xabc"], ["1xabc2"], ("1", True)),
    ],
)
def test_cuts_at_the_first_stop_string(stops: list[str], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert feed(stops, pieces) == expected


def test_holds_back_no_more_than_a_possible_beginning() -> None:
    filter = StopStrings(["END", "NDX"])
    assert filter.push("abcEN") == "abc"
    assert filter.push("?") == "EN?"


@settings(derandomize=True, max_examples=300)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_how_the_text_is_cut_does_not_matter(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert feed(stops, pieces) == feed(stops, list(text)) == feed(stops, [text])
    if not any(stop in text for stop in stops):
        assert feed(stops, pieces) == (text, False)
