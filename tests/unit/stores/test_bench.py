from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dualpath_ray.stores import bench


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_small_run_reports_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: str) -> None:
    monkeypatch.setattr(bench.shutil, "which", lambda _: None)
    arguments = ["--dir", str(tmp_path), "--block-kib", "256", "--total-mib", "1", "--rounds", "1", "--direct", direct, "--json"]
    result = CliRunner().invoke(bench.command, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert set(figures) == {"vs_plain_read", "vs_plain_write", "vs_fio_read", "vs_fio_write", "checksum_cost", "cases"}
    assert figures["vs_plain_read"] > 0
    assert figures["vs_plain_write"] > 0
    assert figures["vs_fio_read"] is None
    (case,) = figures["cases"]
    assert (case["block_bytes"], case["blocks"]) == (256 << 10, 4)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_text_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.shutil, "which", lambda _: "fio")
    monkeypatch.setattr(bench, "run_fio", lambda *_: 0.001)
    result = CliRunner().invoke(bench.command, ["--dir", str(tmp_path), "--block-kib", "256", "--total-mib", "1", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("256 KiB blocks, ")
    assert "x fio" in result.output
