from __future__ import annotations

import pytest

from dualpath_ray.transfer.window_rows import WindowRows, overlap


def test_what_is_taken_is_not_free() -> None:
    rows = WindowRows(10)
    assert rows.free() == [range(10)]
    rows.take("a", range(2, 5))
    rows.take("b", range(4, 6))  # another layer's, over the same rows
    rows.take("c", range(9, 10))
    assert rows.free() == [range(2), range(6, 9)]
    rows.give_back("a")
    assert rows.free() == [range(4), range(6, 9)]
    for owner in ("b", "c", "unknown"):
        rows.give_back(owner)
    assert rows.free() == [range(10)]


def test_all_taken_leaves_nothing() -> None:
    rows = WindowRows(4)
    rows.take("a", range(4))
    rows.take("b", range(1, 2))
    assert rows.free() == []


@pytest.mark.parametrize(("one", "other", "expected"), [((0, 3), (3, 5), False), ((0, 4), (3, 5), True), ((1, 2), (0, 9), True)])
def test_overlap(one: tuple[int, int], other: tuple[int, int], expected: bool) -> None:
    assert overlap(range(*one), range(*other)) is overlap(range(*other), range(*one)) is expected
