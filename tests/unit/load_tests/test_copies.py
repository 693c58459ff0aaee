"""`dualpath bench copies` on a machine that has memcpy and NIXL only, and the arithmetic of the crossover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dualpath_ray.errors import DualPathError
from load_tests.bench.copies import COUNTS, Memory, Way, command, crossover, measure, nothing


def test_every_way_copies_and_is_measured_at_every_count(tmp_path: Path) -> None:
    plot = tmp_path / "copies.png"
    result = CliRunner().invoke(command, ["--json", "--bytes", "256", "--rounds", "2", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    ways = json.loads(result.stdout)["ways"]
    assert {"memcpy", "nixl"} <= set(ways)
    for rows in ways.values():
        assert [row["count"] for row in rows] == list(COUNTS)
        assert all(0 < row["submit_us"] <= row["total_us"] for row in rows)
    assert plot.stat().st_size > 10_000


def test_a_way_that_does_not_copy_is_found_out() -> None:
    with pytest.raises(DualPathError, match="idle did not copy"):
        measure(Way("idle", lambda count: lambda: nothing), Memory(64), 1)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([5, 3, 1], [4, 4, 4], 2), ([1, 1, 1], [4, 4, 4], 1), ([5, 5, 5], [4, 4, 4], None), ([1, 5, 1], [4, 4, 4], 4)],
)
def test_the_crossover_is_where_it_stays_cheaper(one: list[float], other: list[float], expected: int | None) -> None:
    rows = [[{"count": 1 << i, "submit_us": value} for i, value in enumerate(values)] for values in (one, other)]
    assert crossover(*rows) == expected
