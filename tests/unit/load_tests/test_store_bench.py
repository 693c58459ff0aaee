"""`dualpath bench store` runs, says every figure, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from load_tests.bench import store, store_directory

SMALL = ("--block-kib", "256", "--total-mib", "1", "--rounds", "1", "--depth", "2")


@pytest.mark.parametrize("fio", [True, False])
def test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fio: bool) -> None:
    if fio and shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    monkeypatch.setattr(store_directory, "has_fio", lambda: fio)
    result = CliRunner().invoke(store.command, ["--dir", str(tmp_path), *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    assert ("fio is not installed" in result.stderr) == (not fio)
    figures = json.loads(result.stdout)
    assert {"vs_fio_read", "vs_fio_write", "checksum_cost"} <= set(figures)
    assert (figures["vs_fio_read"] is not None) == fio
    (case,) = figures["cases"]
    assert (case["block_bytes"], case["blocks"], case["depth"]) == (256 << 10, 4, 2)
    assert case["read_gbps"] > 0 and case["load_p99_ms"] >= case["load_p50_ms"] > 0
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_directory, "has_fio", lambda: False)
    plot = tmp_path / "rates.png"
    result = CliRunner().invoke(store.command, ["--dir", str(tmp_path), *SMALL, "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert "dir store through" in result.output
    assert plot.stat().st_size > 5000
